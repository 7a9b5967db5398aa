"""What a configuration must satisfy before anything is built: what could only fail later, or be
silently something else, is refused here by name.
"""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from training.activation_checkpointing import CHOICES as CHECKPOINTING
from training.validation import between, integer, one_of, positive_integer, seed, switch

SWITCHES = (
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.detect_anomaly",
    "trainer.use_distributed_sampler",
)
# Not bf16-true and 16-true: a time in half precision has a useless derivative.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
REPLICATED, SHARDED = "training.strategies.Replicated", "training.strategies.Sharded"
DDP = ("lightning.pytorch.strategies.DDPStrategy", REPLICATED)
DIGITS = "training.data.digits.Digits"
ONE_TIME = ("flow_matching", "scm")  # objectives whose network has one time; scd is one of scm
# Arguments of Lightning's Trainer, and what to use in their place.
EPOCHS = "the data are a stream without epochs, of which the same first batches would be repeated"
INSTEAD = {
    "limit_train_batches": f"{EPOCHS}; use trainer.max_steps",
    "overfit_batches": f"{EPOCHS}; use a small data set",
    "profiler": "scripts/profile_step.py says what a step takes",
}
ALIASES = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def check(config: DictConfig) -> None:
    """Raise ``TypeError``, ``ValueError`` or ``NotImplementedError`` at the first wrong setting."""
    seed(config.seed)
    integer("trainer.max_steps", config.trainer.max_steps)
    _check_trainer(config)
    positive_integer("trainer.log_every_n_steps", config.trainer.log_every_n_steps)
    positive_integer("trainer.accumulate_grad_batches", config.trainer.accumulate_grad_batches)
    between("lock_wait", config.lock_wait, 0)
    allowed = config.allow_config_changes
    if not OmegaConf.is_list(allowed) or not all(isinstance(key, str) and key for key in allowed):
        raise TypeError(
            "allow_config_changes must be a list of keys or groups, as [seed,data], or []; got"
            f" {allowed}"
        )
    for key in SWITCHES:
        switch(key, OmegaConf.select(config, key))
    for group in ("callbacks", "logger"):
        for name, part in config[group].items():
            if part is not None and not OmegaConf.is_dict(part):
                raise TypeError(f"{group}.{name} must be null (off) or have keys; got {part!r}")
    _check_precision(config.trainer, OmegaConf.select(config, "optimizer.fused"))
    _check_strategy(config.trainer)
    _check_recipe(config)
    _check_heads(config)
    check_guidance(config.sampler, config)
    for key in ("compile", "cuda_graphs"):
        if config[key] is not None:
            switch(key, config[key])
    one_of("checkpointing", config.checkpointing, CHECKPOINTING)
    if config.cuda_graphs and (reason := no_cuda_graphs(config)):
        raise NotImplementedError(f"cuda_graphs=true: {reason}; use cuda_graphs=null")


def _check_trainer(config: DictConfig) -> None:
    """Arguments of Lightning's that a stream of steps has no use for, or that callbacks stand
    for."""
    trainer = config.trainer
    for key, way in INSTEAD.items():
        if trainer.get(key) not in (None, 0):
            raise NotImplementedError(f"trainer.{key}={trainer[key]} is not supported; {way}")
    if trainer.max_epochs != -1:
        raise NotImplementedError(
            f"trainer.max_epochs={trainer.max_epochs}: the data are a stream without epochs; use"
            " trainer.max_steps"
        )
    if trainer.max_steps == 0:
        raise ValueError("trainer.max_steps must be >= 1, or -1 for no end; got 0")
    for key, name in (("enable_progress_bar", "progress"), ("enable_checkpointing", "checkpoint")):
        if trainer.get(key) is False and config.callbacks.get(name) is not None:
            raise ValueError(f"trainer.{key}=false: use callbacks.{name}=null")
    if trainer.gradient_clip_val is not None:
        between("trainer.gradient_clip_val", trainer.gradient_clip_val, 0)
    time = trainer.max_time
    if time is not None and not isinstance(time, str) and not OmegaConf.is_dict(time):
        raise TypeError(f'trainer.max_time must be "DD:HH:MM:SS", got {time!r}')


def _check_heads(config: DictConfig) -> None:
    """What the network has and no loss would train."""
    own = objective_of(config)
    if config.model.get("second_head") is not None and own != "imf":
        raise ValueError(
            f"model.second_head={config.model.second_head}: objective={own} has no loss for it; use"
            " model.second_head=null, or objective=imf"
        )
    if config.model.get("log_variance") and not config.objective.get("learned_variance"):
        raise ValueError(
            f"model.log_variance=true: objective={own} does not learn it here; use"
            " model.log_variance=false, or objective.learned_variance=true where there is that key"
        )


def on_gpu(trainer: DictConfig) -> bool:
    """Whether the step will run on a GPU."""
    auto = trainer.accelerator == "auto" and torch.cuda.is_available()
    return auto or trainer.accelerator in ("gpu", "cuda")


def objective_of(config: DictConfig) -> str:
    """The name of the objective's module."""
    return config.objective._target_.split(".")[-2]


def sharded(trainer: DictConfig) -> bool:
    """Whether the network will be in shards."""
    strategy: Any = trainer.strategy
    return OmegaConf.is_dict(strategy) and strategy.get("_target_") == SHARDED


def compiled(config: DictConfig) -> bool:
    return on_gpu(config.trainer) if config.compile is None else config.compile


def no_cuda_graphs(config: DictConfig) -> str:
    """Why the step of this configuration cannot be a CUDA graph; empty where it can."""
    mode = OmegaConf.select(config, "objective.jvp.mode")
    if not on_gpu(config.trainer):
        return "the step does not run on a GPU"
    if config.trainer.devices not in (1, "1", [0]) or config.trainer.num_nodes != 1:
        strategy: Any = config.trainer.strategy
        if not OmegaConf.is_dict(strategy) or strategy.get("_target_") not in (REPLICATED, SHARDED):
            return "only trainer=ddp and trainer=fsdp exchange gradients inside of a graph"
        if config.get("context_parallel") is not None:
            return "context_parallel exchanges tokens between the blocks"
    if precision(config.trainer) == "16-mixed":
        return "trainer.precision=16-mixed scales the loss after the step"
    if config.trainer.detect_anomaly:
        return "trainer.detect_anomaly reads every result"
    if mode in ("double", "finite_difference") and config.model.get("dropout"):
        return f"objective.jvp.mode={mode} with model.dropout replays the random state"
    return ""


def _check_recipe(config: DictConfig) -> None:
    """An experiment that is the recipe of one objective is not mixed with another one."""
    recipe, own = config.get("recipe_of"), objective_of(config)
    if recipe not in (None, own):
        raise ValueError(
            f"objective: the experiment is the recipe of objective={recipe}, and its values would"
            f" be mixed with those of {own}; choose an experiment of {own}, or none, or insist with"
            " recipe_of=null"
        )
    if recipe is not None and config.data._target_ == DIGITS:
        raise ValueError(
            f"data: the experiment is a published recipe of {config.trainer.max_steps:,} steps, and"
            " digits are not its data; name yours, as data=latents data.path=LATENTS, or insist"
            " with recipe_of=null"
        )


def warning(config: DictConfig) -> str:
    """What is allowed but hardly meant, in one line, or nothing."""
    steps, denoiser = config.trainer.max_steps, config.objective.get("denoiser_steps")
    if isinstance(denoiser, int) and denoiser >= steps > 0:
        return (
            f"objective.denoiser_steps={denoiser}: the tangent never starts in"
            f" trainer.max_steps={steps}, only a denoiser is trained; lower the one or raise the"
            " other"
        )
    if config.model.get("conditioning") == "t" and objective_of(config) not in ONE_TIME:
        return (
            "model.conditioning=t: the network is not told r, so that u(z, t, r) is the same for"
            " every r; use model.conditioning=t_h"
        )
    return ""


def check_guidance(sampler: DictConfig, config: DictConfig) -> None:
    """Refuse a guidance of the sampler that the network of this configuration did not learn."""
    guidance, most = sampler.get("guidance"), config.objective.get("guidance_max")  # most: iMF's
    if most not in (None, 1) and not config.model.get("guided"):
        raise ValueError(
            "objective=imf needs a model that is told the guidance and has a second head; use"
            " model=imf_tiny (imf_b2, ...), or model.guided=true model.second_head=1"
        )
    if config.objective.get("told"):
        omega = config.objective.omega
        if not config.model.get("guided"):
            raise ValueError(
                "objective.told=true needs a network that has the guidance as a condition; use"
                " model.guided=inverse"
            )
        if guidance not in (1, omega):
            raise ValueError(
                f"sampler.guidance must be objective.omega={omega:g}, which the network is told in"
                f" training, or 1; got {'null' if guidance is None else guidance}"
            )
        return
    if sampler._target_.endswith(".MeanFlowSampler") and guidance is not None:
        if most == 1:
            raise ValueError(
                "sampler.guidance must be null where objective.guidance_max=1: the network is not"
                f" told any then; got {guidance}; use sampler.guidance=null"
            )
        if not config.model.get("guided") or most is None:
            raise ValueError(
                f"sampler.guidance must be null for a network that is not told any; got {guidance};"
                " train with guidance in the target (objective.omega, objective.kappa), or with"
                " objective=imf, whose guidance is chosen when sampling"
            )
        known = isinstance(most, int | float) and isinstance(guidance, int | float)
        beyond = known and float(guidance) > float(most)  # pyright: ignore[reportArgumentType]
        if beyond and not sampler.get("extrapolate"):
            raise ValueError(
                f"sampler.guidance must be <= objective.guidance_max={most:g}, the most that the"
                f" network is told in training; got {guidance}; use a lower one, or"
                " sampler.extrapolate=true"
            )
    elif guidance not in (None, 1) and config.objective.get("label_dropout") == 0:
        raise ValueError(
            f"sampler.guidance must be 1 for a network that never saw a dropped label; got"
            f" {guidance}; train with objective.label_dropout=0.1"
        )


def precision(trainer: DictConfig) -> str:
    """The precision under its full name."""
    given = str(trainer.precision)
    return ALIASES.get(given, given)


def fusable(trainer: DictConfig) -> bool:
    """Whether one kernel may take the optimizer's whole step: it unscales the gradients itself,
    after clipping and guard have seen them, so that Lightning clips none under autocast.
    """
    name = precision(trainer)
    return name != "16-mixed" and not (name == "bf16-mixed" and trainer.gradient_clip_val)


def _check_precision(trainer: DictConfig, fused: bool | None) -> None:
    name = precision(trainer)
    one_of("trainer.precision", name, PRECISIONS)
    if name == "16-mixed" and not on_gpu(trainer):
        raise ValueError(
            "trainer.precision=16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true"
        )
    if fused and not fusable(trainer):
        clipped = " with trainer.gradient_clip_val" if name == "bf16-mixed" else ""
        raise ValueError(
            "optimizer.fused=true hides the scale of the gradients from clipping and from the guard"
            f" under trainer.precision={name}{clipped}; use optimizer.fused=null or false"
        )


def _check_strategy(trainer: DictConfig) -> None:
    strategy: Any = trainer.strategy
    if sharded(trainer):
        if precision(trainer) not in ("32-true", "bf16-mixed"):
            raise NotImplementedError(
                "trainer.precision must be 32-true or bf16-mixed where the network is sharded; got"
                f" {trainer.precision}"
            )
        return
    if OmegaConf.is_dict(strategy):
        strategy = "ddp" if strategy.get("_target_") in DDP else strategy.get("_target_")
    if not isinstance(strategy, str) or not (strategy == "auto" or strategy.startswith("ddp")):
        raise NotImplementedError(
            f"trainer.strategy={strategy}: only this project's own sharding knows the averages, the"
            " teachers and the checkpoints; use trainer=fsdp, or trainer=ddp"
        )
