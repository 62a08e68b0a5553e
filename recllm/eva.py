"""LoRA that starts from the training data (EVA, Paischer et al. 2024): A spans what the layers' inputs vary in most."""

from itertools import count
from typing import Any

import peft
import torch
from torch import Tensor

from recllm.devices import process_state, sharded
from recllm.errors import RecllmError
from recllm.examples import lengths_of
from recllm.loop import Stage

BATCHES = 16
"""First training batches that are read for it, again and again until the directions settle."""
PASSES = 20


def first_batches(stage: Stage) -> list[dict[str, Tensor]]:
    """The first training batches of a stage, as one device collates them."""
    rows = stage.arguments["per_device_train_batch_size"]
    last = min(len(stage.train), BATCHES * rows)
    return [
        stage.collator([stage.train[row] for row in range(start, min(start + rows, last))])
        for start in range(0, last, rows)
    ]


def start_from_data(stage: Stage) -> None:
    """Give the LoRA matrices of a stage's model their start, where its recipe asks for one by the data.

    A gets the first right singular vectors of each layer's inputs, the same number for every layer; B stays zero, so
    that nothing is changed by it. All processes read the same batches, and so have the same start.

    Raises:
        RecllmError: the directions do not settle.
    """
    found = next((module for module in stage.model.modules() if isinstance(module, peft.PeftModel)), None)
    if found is None or getattr(found.active_peft_config, "init_lora_weights", None) != "eva":
        return
    training = stage.model.training
    stage.model.eval()
    if not sharded():  # what is sharded may be too large for one device; this pass then takes the CPU's time
        stage.model.to(process_state().device)

    batches, calls = first_batches(stage), count()

    def read(_: Any, batch: dict[str, Tensor]) -> None:  # noqa: ANN401
        if next(calls) > PASSES * len(batches):  # PEFT itself has no limit, and goes round the batches for ever
            raise RecllmError(
                f"EVA's directions have not settled after {PASSES} passes over {len(batches)} batches. Take a smaller "
                'adapter.r, larger batches, or adapter.init_lora_weights = "pissa".'
            )
        with torch.inference_mode():
            stage.model(**batch)

    def read_places(batch: dict[str, Tensor], _: Any) -> Tensor:  # noqa: ANN401
        lengths = torch.from_numpy(lengths_of(batch))
        return (torch.arange(batch["ids"].shape[1]) < lengths[:, None]).nonzero().to(batch["ids"].device)

    peft.initialize_lora_eva_weights(
        found,
        batches,
        forward_fn=read,
        prepare_model_inputs_fn=read_places,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    stage.model.train(training)
