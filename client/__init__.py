"""Model, data, local training, and the Flower ClientApp."""
