"""deepctr-torch's MMoE on our common model's data, through its public API: MMOE, compile, fit, predict.

    build/peers/bin/python benchmarks/peers/deepctr.py data/wide [--rows N]

Same    the features, the tables' sizes, 4 experts, gates of one layer, towers, batch, rows shuffled, Adam of 1e-3 for the dense
        part, one thread
Not     the tables are updated by that Adam too, with dense gradients: there is no row-wise Adagrad and no sparse gradient
        the loss is summed over the batch, ours is its mean: Adam does not mind
        bags are padded to the longest and summed without the padding
        all rows are in memory before the start, and `fit` copies them into one array of doubles, ids and all

Its L2 of 1e-5 on the tables is off: it would read them all once more in every step.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from sklearn.metrics import roc_auc_score
from wide import Clock, Speeds, Wide, run


def train(data: Wide) -> tuple[str, Speeds, list[float]]:
    # The package asks PyPI for newer versions when imported, with `requests`, which it does not require: here it finds an empty module.
    sys.modules.setdefault("requests", ModuleType("requests"))
    import deepctr_torch
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import MMOE

    columns = [
        *(SparseFeat(name, rows, data.dim) for name, rows in data.ids.items()),
        *(VarLenSparseFeat(SparseFeat(name, rows, data.dim), data.longest[name], "sum") for name, rows in data.bags.items()),
        *(DenseFeat(name) for name in data.numbers),
    ]
    model = MMOE(
        columns,
        num_experts=data.model["num_experts"],
        expert_dnn_hidden_units=data.model["expert"],
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=data.towers[0],  # one for all tasks
        l2_reg_embedding=0,
        task_types=["binary"] * len(data.tasks),
        task_names=data.tasks,
    )
    model.compile(torch.optim.Adam(model.parameters(), **data.adam), loss=["binary_crossentropy"] * len(data.tasks))
    clock = Clock(model)
    model.fit(*data.train, batch_size=data.batch, verbose=0)
    x, y = data.validation
    scores = model.predict(x, data.batch)
    return deepctr_torch.__version__, clock.speeds(data.batch), [roc_auc_score(y[:, i], scores[:, i]) for i in range(len(data.tasks))]


if __name__ == "__main__":
    run("deepctr-torch", __doc__, train)
