"""Which of Ray Train's own callbacks a run goes without."""

import pytest
import ray.train

from cluster.runtime.process_group import TorchBackend, TorchConfig
from cluster.runtime.slim import CLEANER, DATASETS, SlimTrainer


@pytest.mark.parametrize(("own_ray", "left_out"), [(True, {DATASETS, CLEANER}), (False, {DATASETS})])
def test_a_trainer_leaves_out_what_its_run_has_no_use_for(own_ray: bool, left_out: set[str]) -> None:
    config = TorchConfig("gloo")
    assert config.backend_cls is TorchBackend and TorchBackend.share_cuda_visible_devices
    trainer = SlimTrainer(
        lambda: None, own_ray=own_ray, backend_config=config, scaling_config=ray.train.ScalingConfig(num_workers=2)
    )
    usual = [type(callback).__name__ for callback in super(SlimTrainer, trainer)._create_default_callbacks()]
    assert {DATASETS, CLEANER} < set(usual), "Ray has renamed them"
    found = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert found == [name for name in usual if name not in left_out]
