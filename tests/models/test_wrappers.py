"""Networks inside of what trains, compiles or averages them: the rules are those of the network, or it is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from networks import small_network
from serpent_ir import create_model, restore
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.evaluate import evaluate_network
from serpent_ir.export import export_network
from serpent_ir.export.task import WholeTask
from serpent_ir.inference import Restorer
from serpent_ir.inference.restorer import run_network
from serpent_ir.models.wrappers import network_of, unwrapped
from serpent_ir.profiling import count


class Lit(nn.Module):
    """As people write a LightningModule: the network under a name, beside a loss and a `config` of the training."""

    def __init__(self, network: nn.Module, name: str = "model"):
        super().__init__()
        self.name, self.loss, self.config = name, nn.L1Loss(), {"lr": 1e-3, "task": "training"}
        setattr(self, name, network)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


@pytest.fixture
def group():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged of parallel": lambda net: torch.optim.swa_utils.AveragedModel(nn.DataParallel(net)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled, of parallel": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
    "model": Lit,
    "net": lambda net: Lit(net, "net"),
    "Lightning in DataParallel": lambda net: nn.DataParallel(Lit(net)),
    "in a sequence": nn.Sequential,
}


@torch.compiler.set_stance("force_eager")  # what torch.compile returned is called, and compiles nothing
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_rules_are_those_of_the_network_inside(name, group, tmp_path):
    """`restore` gave 16x16 for 16x16 of `sr8`: without the task nothing was upsampled."""
    network = small_network("sr8")
    wrapped = WRAPPERS[name](network).train()
    image = np.random.default_rng(0).integers(0, 256, (9, 16, 3), np.uint8)
    restored = restore(image, wrapped)
    assert restored.shape == (72, 128, 3)
    np.testing.assert_array_equal(restored, restore(image, network))
    assert Restorer(wrapped).scale == 8
    assert type(network_of(wrapped)) is type(network) and wrapped.training
    given = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(run_network(wrapped, given), run_network(network, given))
    Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / "clean.png")
    one, other = (evaluate_network(net, [tmp_path / "clean.png"], "sr8")["psnr"] for net in (wrapped, network))
    assert one == other
    assert count(wrapped, 16, 16).macs == count(network, 16, 16).macs


def test_tiles_of_a_wrapped_network_begin_where_its_own_do():
    network = small_network("deblur")
    image = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    expected = restore(image, network, tile=32, tile_overlap=8)
    torch.testing.assert_close(restore(image, Lit(network), tile=32, tile_overlap=8), expected)
    with pytest.raises(UsageError, match="multiple"):
        restore(image, Lit(network), tile=33)


def test_the_graph_of_a_wrapped_network_has_its_task():
    wrapped = nn.DataParallel(Lit(small_network("sr8")))
    task, image = WholeTask(unwrapped(wrapped, compiled=True)), torch.rand(1, 3, 4, 5)
    assert task.metadata(batch=1)["task"] == "sr8"
    with torch.no_grad():
        torch.testing.assert_close(task(image), restore(image, wrapped), rtol=1e-4, atol=1e-5)


def test_masks_and_channels_of_the_network_inside():
    network = create_model("serpent_b", dim=8, blocks=(1, 1), task="inpaint", in_channels=4)
    image, mask = torch.rand(3, 8, 8), torch.zeros(8, 8)
    mask[2:5, 2:5] = 1
    torch.testing.assert_close(restore(image, Lit(network), mask=mask), restore(image, network, mask=mask))
    with pytest.raises(UsageError, match="need a mask"):
        restore(image, nn.DataParallel(network))


def named(name: str, network: nn.Module) -> nn.Module:
    """A stand-in for a wrapper of this name, which cannot be made on one CPU."""
    wrapper = type(name, (nn.Module,), {})()
    wrapper.module = network
    return wrapper


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DeepSpeedEngine"])
def test_a_share_of_the_weights_is_refused_by_name(name, tmp_path):
    wrapped = named(name, small_network("sr8"))
    image = torch.rand(1, 3, 8, 8)
    for use in (
        lambda: restore(image, wrapped),
        lambda: Restorer(wrapped),
        lambda: run_network(nn.DataParallel(wrapped), image),
        lambda: evaluate_network(wrapped, [], "sr8"),
        lambda: export_network(wrapped, tmp_path / "net.pt2", format="pt2"),
        lambda: count(wrapped, 8, 8),
    ):
        with pytest.raises(UsageError, match=rf"^a {name} holds a share of the weights; gather .*$"):
            use()


def test_fully_shard_is_refused_by_name(group):
    from torch.distributed.fsdp import fully_shard

    network = fully_shard(small_network("sr8"), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(UsageError, match="FSDPModule holds a share"):
        restore(torch.rand(1, 3, 8, 8), network)


def test_networks_of_several_rules_are_refused_by_name():
    both = Lit(small_network("sr8"))
    both.teacher = small_network("deblur")
    with pytest.raises(UsageError, match=r"Lit holds several networks \(model, teacher\) of different rules"):
        restore(torch.rand(1, 3, 8, 8), both)
    both.teacher = small_network("sr8")  # as an average beside it: the rules are the same
    assert restore(torch.rand(1, 3, 4, 4), both).shape == (1, 3, 32, 32)


def test_what_a_module_does_around_its_network_is_done():
    class Negative(Lit):
        def forward(self, x: Tensor) -> Tensor:
            return 1 - self.model(1 - x)

    network = small_network("deblur")
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(run_network(Negative(network), image), 1 - run_network(network, 1 - image))


def test_a_network_that_makes_another_size_than_it_says_is_refused():
    with pytest.raises(SerpentError, match=r"Upsample made 16x12 px of 8x6, and its scale is 1; .* `scale`"):
        restore(torch.rand(3, 6, 8), nn.Upsample(scale_factor=2))
    says = nn.Upsample(scale_factor=2)
    says.scale = 2
    assert restore(torch.rand(3, 6, 8), says).shape == (3, 12, 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_is_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 3, 1))
    script = torch.jit.trace(network, torch.rand(1, 3, 4, 4))
    assert unwrapped(script) is script  # of others nothing is known, as without
    with torch.no_grad():
        script = torch.jit.trace(small_network("sr8"), torch.rand(1, 3, 8, 8), check_trace=False)
    with pytest.raises(UsageError, match="a TorchScript of Serpent does not say which task"):
        restore(torch.rand(1, 3, 8, 8), script)


def test_a_network_that_was_moved_in_part_is_refused_by_name():
    image = np.zeros((16, 16, 3), np.uint8)
    network = small_network()
    part = next(module for module in network.modules() if isinstance(module, torch.nn.Linear))
    part.bfloat16()
    with pytest.raises(UsageError, match=r"do not go together \(bfloat16 on cpu and float32 on cpu\).*; move all"):
        Restorer(network)(image)
    part.to("meta")
    with pytest.raises(UsageError, match=r"weight is on device meta, without values; load its weights$"):
        Restorer(network)
    with pytest.raises(UsageError, match="is on device meta"):
        restore(image, network)
