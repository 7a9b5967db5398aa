"""Every option of every group composes and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from training import config_checks, registry
from training.build import build_data, build_module, settle_batch
from training.config_checks import check_guidance, no_cuda_graphs

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name != "hydra")
# experiments and models are composed where they are built
OPTIONS = [
    path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("experiment", "model")
]
OPTIONS = sorted((path.parent.name, path.stem) for path in OPTIONS)
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))


def composed(*overrides, name="train", run_dir="unused"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, list(overrides), return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(run_dir)
    HydraConfig.instance().set_config(config)
    return config


def training_part(config):
    hydra_free = OmegaConf.masked_copy(config, [k for k in config if k != "hydra"])
    return OmegaConf.to_container(hydra_free, resolve=True)


def check_readable(config):
    """Of a checkpoint of it."""
    stored = training_part(config)
    assert stored["seed"] == 0
    assert registry.checked(stored, "x.ckpt") == stored


def build(config):
    """The module on the meta device: shapes only, whatever the size."""
    data = build_data(config)
    with torch.device("meta"):
        return build_module(OmegaConf.create(training_part(config)), data)


def test_every_group_mirrors_the_code():
    code = {p.name for p in Path(CONFIGS.parent, "training").iterdir()}
    for group in set(GROUPS) - {"experiment", "budget", "recipe"}:  # values of others
        homes = {group, f"{group}s", f"{group}s.py", f"{group}.py"}
        assert homes & code or group == "trainer", group  # trainer's arguments are Lightning's


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda x: str(x))
def test_every_option_of_every_group_composes(group, option):
    check_readable(composed(f"{group}={option}"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds(experiment):
    # Clothes, drawings and CIFAR are not at hand; what is built depends on their shape alone.
    away = experiment.startswith(("fashion_mnist", "openclipart")) or experiment.endswith("cifar10")
    data = ["data=digits"] if away else []
    if experiment == "meanflow_cifar10":
        data += ["~data.flip", "~data.augment"]
    if experiment == "openclipart":
        data += ["~data.num_workers"]
    config = composed(f"experiment={experiment}", *data)
    check_readable(config)
    settle_batch(config)
    module = build(config)
    assert sum(p.numel() for p in module.parameters()) > 100_000


@pytest.mark.parametrize("model", sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml")))
def test_every_model_builds_with_the_injected_attention(model):
    config = composed(f"model={model}", "attention=sdpa")
    check_readable(config)
    module = build(config)
    block = module.net.middle[0] if model == "unet" else module.net.blocks[0]
    assert block.attention.attention.func.__name__ == "sdpa"


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_every_option_with_parts_builds_them(group, tmp_path):
    for path in (CONFIGS / group).glob("*.yaml"):
        if path.stem.startswith("wandb"):
            continue  # starts a service; the command line's test runs it
        for part in composed(f"{group}={path.stem}", run_dir=tmp_path)[group].values():
            assert instantiate(part) is not None


@pytest.mark.parametrize("trainer", ["default", "cpu"])
def test_trainers_are_lightnings(trainer):
    assert instantiate(composed(f"trainer={trainer}").trainer, logger=False).max_epochs == -1


def test_gpu_trainers_name_their_devices():
    assert composed("trainer=gpu").trainer.accelerator == "gpu"
    ddp = composed("trainer=ddp").trainer
    assert (ddp.accelerator, ddp.devices) == ("gpu", -1)
    assert instantiate(ddp.strategy)._ddp_kwargs["gradient_as_bucket_view"]
    fsdp = composed("trainer=fsdp").trainer
    assert (fsdp.accelerator, fsdp.devices) == ("gpu", -1)
    assert instantiate(fsdp.strategy).replicas == 1


def test_what_is_recorded_as_a_cuda_graph():
    two = ["trainer.devices=2", "trainer.accelerator=gpu"]
    assert no_cuda_graphs(composed("trainer=ddp", *two)) == ""
    assert no_cuda_graphs(composed("trainer=fsdp", *two)) == ""
    assert no_cuda_graphs(composed("trainer=fsdp", "trainer.strategy.replicas=2", *two)) == ""
    tokens = composed("trainer=ddp", "context_parallel=ring", *two)
    assert "context_parallel exchanges" in no_cuda_graphs(tokens)
    assert "on a GPU" in no_cuda_graphs(composed("trainer=cpu"))


def test_the_main_job_is_the_experiment_of_its_name():
    default, named = composed(), composed("experiment=digits_meanflow")
    assert training_part(default) == training_part(named)


def test_an_objective_brings_its_sampler_and_the_user_can_choose_another():
    assert composed("objective=flow_matching").sampler.method == "euler"
    assert composed("objective=flow_matching", "sampler=heun").sampler.method == "heun"
    assert composed("experiment=digits_flow_matching").sampler.method == "euler"
    assert "method" not in composed("objective=meanflow").sampler


def test_a_model_receives_the_attention_that_is_asked_for():
    for attention in ("jvp", "sdpa", "reference"):
        config = composed(f"attention={attention}", "experiment=meanflow_b4")
        assert config.model.attention == config.attention
    assert config.attention.backend == "reference"


def test_sampling_composes():
    config = composed("ckpt=x.ckpt", "nfe=2", "sampler=heun", name="sample")
    assert (config.nfe, config.n, config.sampler.method) == (2, 64, "heun")


def test_guidance_beyond_that_of_training_is_asked_for_by_name():
    config = composed("objective=imf", "sampler.guidance=10.5")
    with pytest.raises(ValueError, match=r"guidance_max=8.*sampler\.extrapolate=true"):
        check_guidance(config.sampler, config)
    config.sampler.extrapolate = True
    check_guidance(config.sampler, config)
    published = composed("experiment=imf_l2")
    check_guidance(published.sampler, published)
    assert published.sampler.guidance == 10.5


def test_a_network_that_is_told_the_guidance_is_sampled_with_it():
    config = composed("experiment=tvm_xl2")
    check_guidance(config.sampler, config)
    assert (config.sampler.guidance, config.objective.told) == (2.0, True)
    for guidance, says in ((None, "or 1; got null"), (1.5, "=2, which the network .*; got 1.5")):
        config.sampler.guidance = guidance
        with pytest.raises(ValueError, match=says):
            check_guidance(config.sampler, config)
    config.sampler.guidance = 1
    check_guidance(config.sampler, config)
    config.model.guided = False
    with pytest.raises(ValueError, match=r"objective\.told=true .* model\.guided=inverse"):
        check_guidance(config.sampler, config)
    told_nothing = composed("objective=tvm", "model.guided=inverse", "sampler.guidance=2")
    with pytest.raises(ValueError, match="must be null for a network that is not told any"):
        check_guidance(told_nothing.sampler, told_nothing)


def test_every_recipe_stands_in_the_table_of_published_values():
    page = (CONFIGS.parent / "docs" / "training" / "recipes.md").read_text()
    table = page.split("## Published recipes")[1].split("\n## ")[0]
    other = ("digits", "fashion_mnist", "openclipart", "loss_", "speed_", "long_")
    recipes = [name for name in EXPERIMENTS if not name.startswith(other)]
    assert len(recipes) > 20
    for name in recipes:
        assert f"`{name}`" in table, name


def test_small_data_sets_bring_their_values_and_no_other_inherits_them():
    for objective, key, digits, published in (
        ("meanflow", "data_proportion", 0.5, 0.75),
        ("scm", "sigma_data", 0.8, 0.5),
        ("alphaflow", "end", 1000, 777),
        ("tvm", "label_dropout", 0.0, 0.1),
        ("shortcut", "clip", None, 4.0),
    ):
        small = composed(f"objective={objective}")
        large = composed(f"objective={objective}", "data=imagenet", "trainer.max_steps=777")
        assert (small.objective[key], large.objective[key]) == (digits, published)
        assert (small.optimizer.lr, large.optimizer.lr) == (2e-3, 1e-4)
        assert (small.optimizer.schedule, large.optimizer.schedule) == ("cosine", "constant")
        assert small.trainer.max_steps == 1000
    assert OmegaConf.is_missing(composed("data=imagenet").trainer, "max_steps")
    recipe = composed("experiment=meanflow_xl2")  # on digits too, until data=... is given
    assert (recipe.objective.label_dropout, recipe.optimizer.schedule) == (0.1, "constant")


@pytest.mark.parametrize("experiment", ["meanflow_xl2", "alphaflow_b2"])
def test_a_recipe_is_not_mixed_with_another_objective(experiment):
    with pytest.raises(ValueError, match=r"published recipe of 1,200,.*data=latents data\.path="):
        config_checks.check(composed(f"experiment={experiment}"))  # on digits
    config_checks.check(composed(f"experiment={experiment}", "data=blobs"))
    config = composed(f"experiment={experiment}", "objective=shortcut")
    with pytest.raises(ValueError, match=f"recipe of objective={experiment.split('_')[0]}.*shortc"):
        config_checks.check(config)
    config_checks.check(
        composed(f"experiment={experiment}", "objective=shortcut", "recipe_of=null")
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("+trainer.limit_train_batches=2", "without epochs, .*use trainer.max_steps"),
        ("+trainer.profiler=simple", "scripts/profile_step.py says"),
        ("trainer.max_epochs=1", "without epochs; use trainer.max_steps"),
        ("trainer.max_steps=0", "trainer.max_steps must be >= 1, or -1"),
        ("trainer.enable_progress_bar=false", "use callbacks.progress=null"),
        ("+trainer.enable_checkpointing=false", "use callbacks.checkpoint=null"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be >= 0"),
        ("trainer.max_time=5", "must be .DD:HH:MM:SS., got 5"),
        ("allow_config_changes=seed", "must be a list of keys or groups, .* got seed"),
        ("allow_config_changes=[1]", r"must be a list of keys or groups, .* got \[1\]"),
        ("allow_config_changes=['']", "must be a list of keys or groups"),
        ("allow_config_changes=null", "must be a list of keys or groups, .* got None"),
        ("model.second_head=1", "objective=meanflow has no loss for it"),
        ("model.log_variance=true", "objective=meanflow does not learn it"),
    ],
)
def test_what_would_be_silently_something_else_is_refused(argument, message):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        config_checks.check(composed(argument))


def test_a_network_that_is_not_told_r_is_warned_of():
    assert "not told r" in config_checks.warning(composed("model.conditioning=t"))
    for objective in ("flow_matching", "scm"):
        config = composed(f"objective={objective}", "model.conditioning=t")
        assert not config_checks.warning(config)


@pytest.mark.parametrize(
    ("arguments", "batch"),
    [
        ([], 256),
        (["trainer.accumulate_grad_batches=8"], 32),
        (["trainer.devices=2", "trainer.strategy=ddp"], 128),
        (["trainer.devices=2", "trainer.strategy=ddp", "trainer.accumulate_grad_batches=4"], 32),
        (["data.batch_size=256"], 256),
        (["global_batch_size=null", "data.batch_size=7"], 7),
        (["data.batch_size=32"], "data.batch_size=32 with 1 process.* is a step of 32 images"),
        (
            ["trainer.accumulate_grad_batches=3"],
            "global_batch_size=256 cannot be divided over 1 pr",
        ),
        (["global_batch_size=null"], "data.batch_size must be given where global_batch_size is n"),
        (["global_batch_size=0"], "global_batch_size must be an integer >= 1"),
    ],
)
def test_the_batch_of_a_process_follows_from_that_of_a_step(arguments, batch):
    config = composed("experiment=meanflow_b4", "trainer=cpu", *arguments)
    if isinstance(batch, int):
        settle_batch(config)
        assert config.data.batch_size == batch
    else:
        with pytest.raises(ValueError, match=batch):
            settle_batch(config)


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("callbacks.ema", ["callbacks.ema.decay=1"]),
        ("objective", ["objective=tvm", "objective.teacher_decay=1"]),
        ("objective", ["objective=shortcut", "objective.teacher_decay=1"]),
    ],
)
def test_an_average_that_never_moves_is_refused(part, arguments):
    config = composed(*arguments)
    key = arguments[-1].split("=")[0]
    with pytest.raises((ValueError, InstantiationException), match=f"{key} must be >= 0 and < 1"):
        instantiate(OmegaConf.select(config, part))
