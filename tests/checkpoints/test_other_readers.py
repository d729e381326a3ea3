"""Other readers of checkpoints are safe too, not only a Runner's resume."""

import threading

import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.runner import FlexibleRunner
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint

from rfa_mmdet.checkpoints.safe_loading import BrokenCheckpointError
from rfa_mmdet.errors import ConfigError
from tests.helpers.toy_checkpoints import ToyData, ToyModel


@pytest.mark.parametrize("where", ["meta", "message_hub"])
def test_inferencer_does_not_execute_the_checkpoints_config(tmp_path, where):
    marker = tmp_path / "marker"
    cfg = dict(cfg=f"open({str(marker)!r}, 'w')")
    content = dict(meta=cfg) if where == "meta" else dict(message_hub=dict(runtime_info=cfg))
    torch.save(dict(content, state_dict={}), tmp_path / "a.pth")
    with pytest.raises(
        ConfigError, match=r"DetInferencer\(weights='.*a.pth'\): .* model='CONFIG.py"
    ):
        DetInferencer(weights=str(tmp_path / "a.pth"), device="cpu")
    assert not marker.exists()


def make_flexible_runner(work_dir, name, epochs, **kwargs):
    return FlexibleRunner(
        ToyModel(),
        work_dir=str(work_dir),
        experiment_name=name,
        train_dataloader=dict(
            dataset=ToyData(dict(x=torch.ones(2)) for _ in range(4)),
            batch_size=2,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=[dict(type="LinearLR", end=2, by_epoch=False)],
        log_level="ERROR",
        **kwargs,
    )


@pytest.mark.filterwarnings("ignore")
def test_flexible_runner_resumes_safely(tmp_path):
    make_flexible_runner(tmp_path, "flexible1", 1).train()
    content = _load_checkpoint(str(tmp_path / "epoch_1.pth"))
    content["meta"]["config"] = f"open({str(tmp_path / 'marker')!r}, 'w')"
    path = str(tmp_path / "evil.pth")
    torch.save(content, path)
    runner = make_flexible_runner(tmp_path, "flexible2", 2, resume=True, load_from=path)
    runner.train()
    assert runner.iter == 4
    assert not (tmp_path / "marker").exists()
    content["param_schedulers"][0]["_get_value"] = 3
    torch.save(content, path)
    runner = make_flexible_runner(tmp_path, "flexible3", 2, resume=True, load_from=path)
    with pytest.raises(BrokenCheckpointError, match="does not fit the config's LinearLR"):
        runner.train()


@pytest.mark.skipif(
    not hasattr(torch.serialization, "get_safe_globals"), reason="torch >= 2.4 has the list"
)
def test_loaders_do_not_change_torchs_safe_globals(tmp_path):
    """OneDL's loader changed it for all threads; map_location is called during a load."""
    torch.save(dict(a=torch.ones(1)), tmp_path / "a.pth")
    before, meanwhile = set(torch.serialization.get_safe_globals()), []

    def look(storage, location):
        meanwhile.append(set(torch.serialization.get_safe_globals()))
        return storage

    CheckpointLoader.load_checkpoint(str(tmp_path / "a.pth"), map_location=look)
    assert meanwhile == [before]


def test_threads_resume_independently(tmp_path):
    """Other threads stay safe while one thread is in the middle of a load."""
    torch.save(dict(a=torch.ones(1)), tmp_path / "good.pth")
    torch.save(dict(a=threading.Event), tmp_path / "evil.pth")
    barrier, results = threading.Barrier(8), []

    @CheckpointLoader.register_scheme(prefixes="together://", force=True)
    def load_together(filename, map_location):
        barrier.wait(60)
        return torch.load(filename.removeprefix("together://"), map_location, weights_only=False)

    def run(name):
        for _ in range(5):
            try:
                results.append((name, type(_load_checkpoint(f"together://{tmp_path}/{name}.pth"))))
            except ValueError as error:
                results.append((name, type(error).__name__))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("good", "evil") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(results), key=str) == [("evil", "UnsafeCheckpointError"), ("good", dict)]
    assert len(results) == 40
