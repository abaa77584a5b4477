"""The contestants' optimizers, ours and others', each with a learning rate for every kind of parameter."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_shampoo4.exceptions import ConfigError, InputError, MissingPackage
from hf_shampoo4.groups import is_of_matrices, param_groups
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.options import KINDS
from hf_shampoo4.studies import muon as muon_module
from hf_shampoo4.studies.code_version import versions
from hf_shampoo4.studies.fingerprint import fingerprint
from hf_shampoo4.studies.muon import Float32, Joined, Linear8, Muon, MuonQ4

Chosen = tuple[type, dict[str, Any]]
"""What a Trainer takes as `optimizer_cls_and_kwargs`; `params` are groups, each of one `kind`."""
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """An optimizer that the Trainer has no name for."""

    package: str
    make: Callable[[nn.Module, Any], Chosen]
    """Of the model and the TrainingArguments."""
    sources: tuple[Any, ...] = ()
    """Modules of this package whose text decides too."""


# The packages behind names of the Trainer's own; ours is hf_shampoo4's, the rest torch's.
PACKAGES = {
    "adamw_bnb_8bit": "bitsandbytes", "adamw_8bit": "bitsandbytes", "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao", **dict.fromkeys(OPTIMS, "hf_shampoo4"),
}  # fmt: skip


def optimizer_of(settings: Settings) -> Callable[[nn.Module, Any], Chosen]:
    """How to make the optimizer of a run, as `training.pretrain.run` takes it.

    Args:
        settings: a `peer`, or else the `optim` of the TrainingArguments; `rates`, factors on the learning rate by kind
            (`options.KINDS`), 1 where there is none.

    Raises:
        ConfigError: a peer or a kind that does not exist.
    """
    rates, name = settings.get("rates", {}), settings.get("peer")
    if strange := sorted(set(rates) - set(KINDS)):
        raise ConfigError(f"rates has no kind {strange[0]!r}; kinds are {', '.join(KINDS)}")
    if name is not None and name not in PEERS:
        raise ConfigError(f"there is no peer {name!r}; there are: {', '.join(PEERS)}")

    def make(model: nn.Module, args: Any) -> Chosen:
        chosen, kwargs = PEERS[name].make(model, args) if name else _of_the_trainer(model, args)
        groups = [{**g, "lr": kwargs["lr"] * rates.get(g["kind"], 1.0)} for g in kwargs["params"]]
        if settings.get("optim") not in OPTIMS or name:
            groups = [{key: value for key, value in group.items() if key != "kind"} for group in groups]
            chosen = _loading_as_saved(chosen)
        return chosen, {**kwargs, "params": groups}

    return make


def _loading_as_saved(chosen: type) -> type:
    """The class, but that a loaded state has the types in which it was saved; torch makes codes what parameters are."""

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        chosen.load_state_dict(self, state_dict)  # type: ignore[attr-defined]
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            state = self.state.get(parameter, {})
            for key, saved in state_dict["state"].get(place, {}).items():
                if isinstance(saved, torch.Tensor) and state[key].dtype != saved.dtype:
                    state[key] = saved.to(parameter.device)

    return type(chosen.__name__, (chosen,), {"load_state_dict": load_state_dict, "__module__": chosen.__module__})


def train_settings(settings: Settings) -> dict[str, Any]:
    """Those of a run that `hf-shampoo4 train` has, with a stand-in for the optimizer that `optimizer_of` makes."""
    rest = {key: value for key, value in settings.items() if key not in ("peer", "rates")}
    return {"optim": "adamw_torch", **rest}


def code_of(settings: Settings) -> dict[str, str]:
    """The versions of what makes a run with these settings, see `code_version.versions`.

    Ours is `source/bits`: a digest of the code, and one of what it computes with these options (`fingerprint`).
    """
    if "peer" in settings and settings["peer"] in PEERS:
        peer = PEERS[settings["peer"]]
        return versions([peer.package], getattr(peer.make, "func", peer.make), *peer.sources)
    package = PACKAGES.get(settings.get("optim", ""))
    found = versions([package] if package else [])
    if package == "hf_shampoo4":
        try:
            found[package] += f"/{fingerprint(settings)}"
        except InputError:  # a run of a time that had other options
            found[package] += "/refused"
    return found


def _of_the_trainer(model: nn.Module, args: Any) -> Chosen:
    chosen, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if isinstance(kwargs.get("block_size"), str):  # transformers 5.23 hands torchao the text of optim_args
        kwargs["block_size"] = int(kwargs["block_size"])
    return chosen, {"params": _groups(model, args), **kwargs}


def _groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    """Groups of one kind each, decayed as the Trainer decays, without options of ours."""
    return [
        {
            "params": [parameter for _, parameter in group["params"]],
            "weight_decay": group["weight_decay"],
            "kind": group["kind"],
        }
        for group in param_groups(model, args.weight_decay)
    ]


def muon(model: nn.Module, args: Any) -> Chosen:
    """Muon on the hidden matrices (Nesterov, Moonlight's scaling), AdamW on the rest with the rates of its kinds."""
    # `_muon_groups`, but the text of this function is in the key of the finished runs (`code_of`)
    groups = [
        {**plain, "use_muon": is_of_matrices(ours)}
        for plain, ours in zip(_groups(model, args), param_groups(model, args.weight_decay), strict=True)
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    chosen = _imported("pytorch_optimizer", "Muon")
    if not torch.accelerator.is_available():
        _in_float32(importlib.import_module("pytorch_optimizer.optimizer.muon.base"))
    return chosen, {"lr": args.learning_rate, "adamw_betas": betas, "use_adjusted_lr": True, "params": groups}


def muon_as_published(model: nn.Module, args: Any) -> Chosen:
    """Muon as Keller Jordan has it: Nesterov, sqrt(max(1, m / n)), and AdamW of its own rate for the rest."""
    chosen, kwargs = muon(model, args)
    return chosen, {**kwargs, "use_adjusted_lr": False}


def normuon(model: nn.Module, args: Any) -> Chosen:
    """NorMuon (2510.05491): rows normalised after orthogonalising, a root mean square of .2, AdamW for the rest."""
    betas = (args.adam_beta1, args.adam_beta2)
    chosen = _imported("pytorch_optimizer", "NorMuon")
    if not torch.accelerator.is_available():
        _in_float32(importlib.import_module("pytorch_optimizer.optimizer.muon.base"))
        _in_float32(importlib.import_module("pytorch_optimizer.optimizer.muon.normuon"))
    groups = _muon_groups(model, args)
    return chosen, {"lr": args.learning_rate, "adamw_betas": betas, "update_scale": "match_rms", "params": groups}


def torch_muon(model: nn.Module, args: Any) -> Chosen:
    """torch's own Muon, iterating in bfloat16, with Moonlight's scaling, and torch's AdamW for the rest."""
    return _joined(model, args, (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}), (torch.optim.AdamW, {}))


def our_muon(store: type, rest: str, model: nn.Module, args: Any) -> Chosen:
    """`studies.muon` with its momentum kept in a `store`, and an AdamW of `package:class` for the rest."""
    package, _, name = rest.partition(":")
    keywords = {"block_size": 128} if package == "torchao.optim" else {}
    return _joined(model, args, (Muon, {"store": store()}), (_imported(package, name), keywords))


def _joined(
    model: nn.Module, args: Any, matrices: tuple[type, dict[str, Any]], rest: tuple[type, dict[str, Any]]
) -> Chosen:
    kind, keywords = rest
    second = (kind, {"betas": (args.adam_beta1, args.adam_beta2), **keywords})
    groups = _muon_groups(model, args)
    return Joined, {"lr": args.learning_rate, "first": matrices, "second": second, "params": groups}


def _muon_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    return [
        {**plain, "use_muon": is_of_matrices(ours)}
        for plain, ours in zip(_groups(model, args), param_groups(model, args.weight_decay), strict=True)
    ]


def soap(model: nn.Module, args: Any) -> Chosen:
    """SOAP in float32, refreshed every 10 steps, its own betas; no basis for a vocabulary-sized side."""
    kwargs = {"lr": args.learning_rate, "max_precondition_dim": 2048, "params": _groups(model, args)}
    return _imported("pytorch_optimizer", "SOAP"), kwargs


def heavyball(name: str, model: nn.Module, args: Any) -> Chosen:
    """HeavyBall's class of that name at its defaults (bases refreshed every 2 steps), without compilation."""
    chosen = _imported("heavyball", name)
    utilities: Any = importlib.import_module("heavyball.utils")
    utilities.compile_mode = None  # its default, max-autotune, is for GPUs
    kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "params": _groups(model, args)}
    return chosen, kwargs


def heavyball_matrices(name: str, model: nn.Module, args: Any) -> Chosen:
    """HeavyBall's class on the hidden matrices alone, and torch's AdamW for the rest, as Muon has it.

    Its KL-Shampoo moves vectors by their plain gradients, and divides a vocabulary's by its narrow side's root alone.
    """
    chosen, kwargs = heavyball(name, model, args)
    return _joined(model, args, (chosen, {"betas": kwargs["betas"]}), (torch.optim.AdamW, {}))


def _in_float32(module: Any) -> None:
    """Have Muon iterate in float32: a CPU without bfloat16 products takes a hundred times as long for those."""
    name = "zero_power_via_newton_schulz_5"
    iterate = getattr(module, name)
    setattr(module, name, functools.partial(getattr(iterate, "func", iterate), dtype=torch.float32))


def _imported(package: str, name: str) -> type:
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise MissingPackage(f"{name} is {package}'s, which is not installed: pip install {package}") from error


def _our_muon(store: type, package: str, rest: str) -> Peer:
    return Peer(package, functools.partial(our_muon, store, rest), (muon_module,))


PEERS: dict[str, Peer] = {
    "muon": Peer("pytorch_optimizer", muon),
    "muon_as_published": Peer("pytorch_optimizer", muon_as_published),
    "normuon": Peer("pytorch_optimizer", normuon),
    "torch_muon": Peer("torch", torch_muon),
    "muon_float32": _our_muon(Float32, "torch", "torch.optim:AdamW"),
    "muon_8bit": _our_muon(Linear8, "torch", "torch.optim:AdamW"),
    "muon_8bit_rest8": _our_muon(Linear8, "bitsandbytes", "bitsandbytes.optim:AdamW8bit"),
    "muon_4bit": _our_muon(MuonQ4, "torch", "torch.optim:AdamW"),
    "muon_4bit_rest4": _our_muon(MuonQ4, "torchao", "torchao.optim:AdamW4bit"),
    "soap": Peer("pytorch_optimizer", soap),
    "heavyball_kl_shampoo": Peer("heavyball", functools.partial(heavyball_matrices, "KLShampoo")),
    "heavyball_kl_soap": Peer("heavyball", functools.partial(heavyball, "KLSOAP")),
}
