# Makes an interrupted and resumed run end with the same weights as an uninterrupted one and, with
# several processes, makes each of them validate the model that is saved. To add hooks in a config:
# custom_hooks = [*_base_.custom_hooks, dict(...)].
custom_hooks = [
    dict(type="EpochSeedHook"),
    dict(type="SyncBuffersHook"),
]
