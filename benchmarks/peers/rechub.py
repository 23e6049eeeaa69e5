"""torch-rechub's MMoE on our common model's data, through its public API: DataGenerator, MMOE, MTLTrainer.

    build/peers/bin/python benchmarks/peers/rechub.py data/wide [--rows N]

Same    the features, the tables' sizes, 4 experts, towers, batch, rows shuffled, Adam of 1e-3 and no decay for the dense part, one thread
Not     the tables are updated by that Adam too, with dense gradients: there is no row-wise Adagrad and no sparse gradient
        a batch norm follows every linear layer, in the gates too: MLP always has it
        the loss is the mean of the tasks' losses, ours their sum
        bags are padded to the longest and summed without the padding
        all rows are in memory before the start, as a dict of NumPy arrays; its Dataset takes them apart row by row

Its default weight decay of 1e-5 is off. Its `fit` is `train_one_epoch`, `evaluate`, and two copies of the weights, one of them on
disk: only the first two are called here.
"""

from __future__ import annotations

import torch_rechub
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator
from wide import Clock, Speeds, Wide, run


def train(data: Wide) -> tuple[str, Speeds, list[float]]:
    features = [
        *(SparseFeature(name, rows, data.dim) for name, rows in data.ids.items()),
        *(SequenceFeature(name, rows, data.dim, pooling="sum", padding_idx=0) for name, rows in data.bags.items()),
        *(DenseFeature(name) for name in data.numbers),
    ]
    types = ["classification"] * len(data.tasks)
    towers = [{"dims": tower} for tower in data.towers]
    model = MMOE(features, types, data.model["num_experts"], {"dims": data.model["expert"]}, towers)
    trainer = MTLTrainer(model, types, optimizer_params=data.adam)
    x, y = data.validation
    loaders = DataGenerator(*data.train).generate_dataloader(x_val=x, y_val=y, x_test=x, y_test=y, batch_size=data.batch)
    clock = Clock(model)
    trainer.train_one_epoch(loaders[0])
    return torch_rechub.__version__, clock.speeds(data.batch), trainer.evaluate(model, loaders[1])


if __name__ == "__main__":
    run("torch-rechub", __doc__, train)
