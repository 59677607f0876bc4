"""A stock server. With FedAvg it averaged A and B each for itself; the two lines marked are all that has changed."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict

import fedapt  # instead of: from flwr.serverapp.strategy import FedAvg
from lora_app.task import new_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    recipe = str(context.run_config["recipe"])
    strategy = fedapt.strategy(recipe, fraction_train=1.0)  # instead of: FedAvg(fraction_train=1.0)
    initial = ArrayRecord(get_peft_model_state_dict(new_model()))
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(context.run_config["rounds"]))
    for number, metrics in result.train_metrics_clientapp.items():
        accuracy = result.evaluate_metrics_clientapp[number]["accuracy"]
        print(f"round {number}: accuracy {accuracy:.3f}, aggregation error {metrics['aggregation_error']:.1e}")
