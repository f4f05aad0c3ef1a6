"""Settings and values that release 0.2 had and this one has not.

A key of ``REMOVED`` is ``section.setting``, or ``section.setting=value`` with a text or number as value; of a list, an
element counts. In ``data`` it is also a setting of each source. The text says what to do instead.
"""

_OWN_RULE = "use muon, or a rule of your own as FILE.py:NAME"
_PROJECTION = "give examples/optimizers/galore.py or apollo.py in optim.matrices, and its settings in optim.rule"
_SPIKES = "remove it: steps that are not finite are skipped; lower optim.lr or optim.clip against spikes of the loss"
_EPOCHS = "give the source a lower weight, or other weights from a step on in data.stages"
REMOVED = {
    "data.at_max_epochs": _EPOCHS,
    "data.max_epochs": _EPOCHS,
    "method.base=bf16": "use train.precision=bf16, or int8",
    "method.full_steps": "remove it: early merges do more than a start at full rank",
    "method.name=sltrain": "use remora, which was better, or lora",
    "method.operators=7": "use [1, 2], which was 3 % better",
    "method.sparse_density": "remove it: no method has a sparse matrix",
    "optim.lr_full": "remove it: method.full_steps is gone",
    "optim.matrices=apollo": "use examples/optimizers/apollo.py:Apollo, with its settings in optim.rule",
    "optim.matrices=apollo_mini": "use adamw8bit, which keeps a quarter of AdamW's state",
    "optim.matrices=fira": _OWN_RULE,
    "optim.matrices=galore": "use examples/optimizers/galore.py:GaLore, with its settings in optim.rule",
    "optim.matrices=lora_muon": "use muon, which was better on A and B",
    "optim.matrices=normuon": "use muon, which was as good",
    "optim.matrices=polar_muon": "use muon",
    "optim.matrices=sumo": _OWN_RULE,
    "optim.others=apollo_mini": "use adamw8bit, which keeps a quarter of AdamW's state",
    "optim.cautious_decay": "remove it; weight decay is of all elements",
    "optim.projection_every": _PROJECTION,
    "optim.projection_rank": _PROJECTION,
    "optim.projection_scale": _PROJECTION,
    "train.on_spike": _SPIKES,
    "train.spike_deviations": _SPIKES,
    "train.spike_window": _SPIKES,
}
