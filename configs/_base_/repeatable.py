# What a run needs so that it can be interrupted, resumed, and end at the same weights; and, in
# several processes, so that the model that each validates is the one that is saved. A config with
# custom_hooks of its own replaces these: custom_hooks = [*_base_.custom_hooks, dict(...)].
custom_hooks = [
    dict(type="EpochSeedHook"),
    dict(type="SyncBuffersHook"),
]
