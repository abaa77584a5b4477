"""`--optim shampoo4bit` in the Hugging Face Trainer, and the way without any patching.

Imports neither torch nor transformers until a training starts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..options import (
    NAMES,
    OF_GROUPS,
    STOCHASTIC_HEAD,
    Options,
    pairs_as_text,
    parse_optim_args,
    resolve,
    resolve_for_all,
)
from .hooks import after_import, wrap_once
from .saving import follow_saves

if TYPE_CHECKING:
    from torch import nn

    from ..optimizer import Shampoo4bit

# --optim NAME -> the options it stands for; --optim_args win over them
OPTIMS: dict[str, dict[str, Any]] = {
    "shampoo4bit": {},
    "soap4bit": {"algorithm": "soap"},
    "kl_shampoo4bit": {"algorithm": "kl_shampoo"},
    "adamw4bit": {"algorithm": "elementwise", "moments": "4bit"},
}

_decayed: ContextVar[Callable[[nn.Module], Collection[str]] | None] = ContextVar("decayed", default=None)
"""What names the parameters to decay, of a Trainer that has an own way to say it, while it makes its optimizer."""


def register() -> None:
    """Add the names of `OPTIMS` to `--optim` of the Hugging Face Trainer; calling it again changes nothing.

    Call it before `TrainingArguments` are made, before or after transformers is imported.  Touched are the enum
    `OptimizerNames`, the static method `Trainer.get_optimizer_cls_and_kwargs`, the list `DEFAULT_CALLBACKS`, and the
    methods `CallbackHandler.add_callback`, `Trainer.create_optimizer` and those that write a checkpoint (saving.py).
    """
    after_import("transformers.training_args", _extend_optimizer_names)
    after_import("transformers.trainer", _extend_trainer)
    after_import("transformers.trainer", _follow_decay)
    follow_saves()


def trainer_kwargs(model: nn.Module | None, args: Any, **options: Any) -> dict[str, Any]:
    """What to pass to a Trainer instead of `--optim`: `Trainer(model, args, **trainer_kwargs(model, args))`.

    Nothing of transformers is changed but what saves a checkpoint (saving.py) and `Trainer.create_optimizer`, which
    tells what a `get_decay_parameter_names` of your own says.
    `callbacks=[hf_shampoo4.Shampoo4bitCallback]` adds the report; trackers see its numbers only if it runs before them:
    `trainer.callback_handler.callbacks.insert(0, Shampoo4bitCallback())`.  After `register()` it is there already.

    The optimizer is made for the model that the Trainer comes to train: what `model_init` returns, in every trial of a
    hyperparameter search with its learning rate, or what a TRL trainer has made of the model by `peft_config`.

    Args:
        model: the model that the Trainer gets, for a look at whether it can be trained; None if `model_init` makes it.
        args: TrainingArguments; read are learning_rate, adam_beta1, adam_beta2, adam_epsilon, weight_decay and
            optim_target_modules.
        options: options of the optimizer, `preset` and `config` among them.

    Returns:
        `{"optimizer_cls_and_kwargs": (what makes the optimizer, {})}`.

    Raises:
        OptionError: an option that does not exist or has a value that is not allowed.
        ValueError: there is no matrix to precondition, optim_target_modules matches nothing, or DeepSpeed is configured
            in a way in which this optimizer would not be used or could not work.
    """
    chosen = resolve_for_all(options)
    after_import("transformers.trainer", _follow_decay)
    follow_saves()
    _optimizer_cls_and_kwargs(args, model, chosen)
    given = weakref.ref(model) if model is not None else lambda: None

    def made(trained: Any = None) -> Any:
        """A factory to transformers >= 5.2, which calls it for what makes the optimizer from the model."""
        if trained is None:
            return made
        if not hasattr(trained, "named_parameters"):  # before 5.2: parameter groups
            trained = _model_of(trained, given())
        cls, kwargs = _optimizer_cls_and_kwargs(args, trained, chosen)
        return cls(kwargs.pop("params"), **kwargs)

    return {"optimizer_cls_and_kwargs": (made, {})}


def _model_of(groups: list[dict[str, Any]], model: nn.Module | None) -> nn.Module:
    """The model that trainer_kwargs was given, if it is the one that is trained: an older Trainer does not show it.

    Raises:
        ValueError: it is not.
    """
    trained = {id(p) for group in groups for p in group["params"]}
    if model is None or any(p.requires_grad and id(p) not in trained for p in model.parameters()):
        raise ValueError(
            "the Trainer trains another model than trainer_kwargs was given (by model_init or peft_config), which "
            "transformers before 5.2 does not show to it: use transformers 5.2, or hf_shampoo4.register() and --optim"
        )
    return model


def asked_optim(args: Any) -> str:
    """`args.optim` as users write it: a member of transformers' enumeration, or text."""
    return str(getattr(args.optim, "value", args.optim))


def check_args(args: Any) -> None:
    """Refuse TrainingArguments that ask for one of our optimizers in a way that cannot work.

    Raises:
        OptionError: an item of `optim_args` that is not `key=value`, unknown, or not allowed.
        ValueError: DeepSpeed is configured in a way in which this optimizer would not be used or could not work.
    """
    if args.optim in OPTIMS:
        optim_options(args.optim, args.optim_args)
        _check_deepspeed(args)


def optim_options(optim: str, optim_args: str | None) -> dict[str, Any]:
    """The options that `--optim`, one of `OPTIMS`, and `--optim_args` stand for; the others are at their defaults.

    Raises:
        OptionError: an item of `optim_args` that is not `key=value`, unknown, or not allowed.
    """
    named = OPTIMS[optim]
    return {**named, **parse_optim_args(optim_args, beneath=named)}


def optim_name(optimizer: Shampoo4bit, asked: str = "shampoo4bit") -> str:
    """The `--optim` and `--optim_args` that stand for what an optimizer has, whoever made it and whatever was loaded.

    Args:
        optimizer: where its groups differ in an option, what it was made with counts.
        asked: a name of `OPTIMS`, kept if it stands for the same algorithm.
    """
    has = {name: _of_most(name, optimizer) for name in NAMES if name not in OF_GROUPS}
    if has["stochastic_last"]:
        has["stochastic_from"] = 0  # which the callback makes of it
    optim = asked if OPTIMS[asked].get("algorithm", Options.algorithm) == has["algorithm"] else "shampoo4bit"
    usual = {**vars(Options()), **OPTIMS[optim]}
    given = {"algorithm": has["algorithm"]} if has["algorithm"] != usual["algorithm"] else {}
    usual |= resolve(given, beneath=OPTIMS[optim])
    given |= {name: value for name, value in has.items() if value != usual[name]}
    return f"{optim} {pairs_as_text(given)}".rstrip()


def _of_most(name: str, optimizer: Shampoo4bit) -> Any:
    values = [group[name] for group in optimizer.param_groups]
    return optimizer.defaults[name] if optimizer.defaults[name] in values else values[0]


def _optimizer_cls_and_kwargs(args: Any, model: nn.Module | None, options: dict[str, Any]) -> tuple[Any, dict]:
    _check_deepspeed(args)
    from ..optimizer import Shampoo4bit

    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        **options,
    }
    if model is not None:
        from ..groups import param_groups, require_preconditioned

        names = _decayed.get()
        groups = param_groups(
            model,
            args.weight_decay,
            _target_rule(args.optim_target_modules, model),
            head_options(options),
            None if names is None else {*names(model)},
        )
        require_preconditioned(groups, options)
        kwargs["params"] = [_apart(group) for group in groups]
    return Shampoo4bit, kwargs


def _apart(group: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a group as they are, for others look for theirs in it, and their names beside them."""
    from ..sharding.local_parameter import note_name

    for name, p in group["params"]:
        note_name(p, name)
    return {**group, "params": [p for _, p in group["params"]], "param_names": [name for name, _ in group["params"]]}


def head_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the output head gets besides the options of all: the last part of training with stochastic rounding."""
    share = STOCHASTIC_HEAD.get(options.get("moments", ""), 0.0)
    chosen = any(name in options for name in ("stochastic_last", "stochastic_from"))
    return {"stochastic_last": share} if share and not chosen else {}


def _target_rule(targets: str | list[str] | None, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
    """`optim_target_modules` as transformers reads it for GaLore: modules to precondition; the rest is elementwise."""
    if not targets:
        return None
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.trainer_utils import check_target_module_exists

    def is_target(name: str, module: nn.Module) -> bool:
        if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
            return isinstance(module, (nn.Linear, Conv1D))
        return bool(check_target_module_exists(targets, name))

    if not any(is_target(name, module) for name, module in model.named_modules()):
        example = next((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), "")
        raise ValueError(
            f"optim_target_modules={targets!r} matches no module of the model; it must be 'all-linear', a regular "
            f"expression that matches a whole module name, or a list of parts of names (one name here: {example!r})"
        )
    return is_target


def _check_deepspeed(args: Any) -> None:
    """Refuse configurations under which another optimizer would train instead, or ours could not."""
    plugin = getattr(args, "deepspeed_plugin", None)  # of --deepspeed as of `accelerate launch`
    config: dict[str, Any] = plugin.hf_ds_config.config if plugin is not None else {}
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    problem = ""
    if "optimizer" in config:
        problem = 'has an "optimizer" of its own, which would be used instead of hf_shampoo4: remove it'
    elif offload == "nvme":
        problem = 'offloads the optimizer to NVMe, which hf_shampoo4 cannot follow: set "offload_optimizer" to the CPU'
    elif offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        problem = (
            "offloads the optimizer and would use DeepSpeedCPUAdam instead of hf_shampoo4: "
            'add "zero_force_ds_cpu_optimizer": false'
        )
    if problem:
        raise ValueError(f"the DeepSpeed configuration {problem}")


def _extend_trainer(module: ModuleType) -> None:
    """Answer for our names in the public static method that every Trainer, old or new, asks for its optimizer.

    The table of handlers behind it is private, and reached only after transformers' own parser of optim_args, which
    deletes spaces and says "not enough values to unpack" where options/parsing.py can say what is wrong.
    """
    from .callback import Shampoo4bitCallback

    if Shampoo4bitCallback not in module.DEFAULT_CALLBACKS:
        module.DEFAULT_CALLBACKS.append(Shampoo4bitCallback)  # trackers come after it, and log what it adds
    wrap_once(module.CallbackHandler, "add_callback", _adding_one_of_ours)
    wrap_once(module.Trainer, "get_optimizer_cls_and_kwargs", _answering)


def _adding_one_of_ours(original: Any) -> Any:
    """A callback of ours that is added beside the default one takes its place: two would count and print all twice."""
    from .callback import Shampoo4bitCallback

    def add_callback(handler: Any, callback: Any) -> None:
        there = [i for i, one in enumerate(handler.callbacks) if isinstance(one, Shampoo4bitCallback)]
        if there and issubclass(callback if isinstance(callback, type) else type(callback), Shampoo4bitCallback):
            handler.callbacks[there[0]] = callback() if isinstance(callback, type) else callback
        else:
            original(handler, callback)

    return add_callback


def _answering(original: Any) -> Any:
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if args.optim not in OPTIMS:
            return original(args, model)
        if model is None and args.optim_target_modules:
            raise ValueError(
                f"optim_target_modules={args.optim_target_modules!r} needs the model: call "
                "get_optimizer_cls_and_kwargs(args, model), and take its groups out of what it returns: "
                'groups = kwargs.pop("params")'
            )
        return _optimizer_cls_and_kwargs(args, model, optim_options(args.optim, args.optim_args))

    return get_optimizer_cls_and_kwargs


def _follow_decay(module: ModuleType) -> None:
    """A Trainer's class may say itself what is decayed; the static method above, which has no Trainer, is told so."""

    def telling(original: Any) -> Any:
        def create_optimizer(trainer: Any, *arguments: Any, **named: Any) -> Any:
            names = getattr(trainer, "get_decay_parameter_names", None)
            is_own = getattr(names, "__func__", names) is not getattr(module.Trainer, "get_decay_parameter_names", None)
            token = _decayed.set(names if is_own else None)
            try:
                return original(trainer, *arguments, **named)
            finally:
                _decayed.reset(token)

        return create_optimizer

    wrap_once(module.Trainer, "create_optimizer", telling)


def _extend_optimizer_names(module: ModuleType) -> None:
    for value in OPTIMS:
        if value not in module.OptimizerNames._value2member_map_:
            _add_member(module.OptimizerNames, value)


def _add_member(names: Any, value: str) -> None:
    """One more member of a str-mixin Enum, as EnumMeta would have made it."""
    name = value.upper()
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__, member._sort_order_ = name, value, names, len(names)
    # Pickle asks the instance: saved arguments must load in a process that has not called register().
    member.__reduce_ex__ = lambda protocol: (_restore_member, (value,))
    setattr(names, name, member)  # before the maps: EnumMeta refuses to set a name that it knows
    names._member_names_.append(name)
    names._member_map_[name] = names._value2member_map_[value] = member
    if hasattr(names, "_hashable_values_"):  # Python >= 3.12: `"shampoo4bit" in OptimizerNames`
        names._hashable_values_.append(value)


def _restore_member(value: str) -> Any:
    register()
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)
