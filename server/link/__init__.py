"""The link's server side: one gRPC port, one stream a node, and a grid over the nodes that hold one open."""
