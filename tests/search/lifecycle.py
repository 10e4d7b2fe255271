"""Operations that change which adapters there are, which are active, or where the weights live."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields, replace
from typing import Any

import models
import oracle
import torch
from edits import edited, put, set_factor
from models import MAY_REFUSE, UNMERGEABLE, ConfigSpec, Net
from operations import Op, Skip, has_originals, look, operation, unmerged
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from world import BOUNDS, FLOOR, Disagreement, Known, World, check, same_bits


def drawn_config(op: Op, world: World, like: ConfigSpec | None = None) -> ConfigSpec:
    """A configuration from the operation's numbers; of the same layers as `like`."""
    config = ConfigSpec(
        r=1 + op.a % 3,
        alpha=(1, 3, 4)[op.b % 3],
        rslora=op.a % 2 == 1,
        detach_norm=op.b % 4 != 3,
        magnitude_only=int(op.a % 5 == 4),
        fewer=op.b % 5 == 4,
        init=(True, False, "gaussian")[op.a % 3],
        filled=op.b % 6 != 5,
        low_precision=world.first.low_precision,
        seed=op.a + op.b,
    )
    return models.suited(config, world.spec, like)


def activate(world: World, names: list[str]) -> None:
    if len(names) == 1:
        world.model.set_adapter(names[0])
    else:
        world.model.base_model.set_adapter(names)
    world.active = names


def add(world: World, config: ConfigSpec) -> str:
    name = f"adapter{len(world.adapters)}"
    if len(world.adapters) > 3 or name in world.adapters:
        raise Skip
    world.model.add_adapter(
        name, models.dora_config(config, world.spec), autocast_adapter_dtype=not config.low_precision
    )
    world.note(name, config)
    return name


@operation()
def add_adapter(world: World, op: Op) -> None:
    """Another adapter, which leaves the outputs as they are until it is active."""
    unmerged(world)
    name = add(world, drawn_config(op, world))
    look(world, op, "added an inactive adapter")
    if op.a % 2:
        activate(world, [name])
        look(world, op, "added an active adapter")


@operation()
def copy_adapter(world: World, op: Op) -> None:
    """A frozen copy through .data, as preference trainers make of the trained adapter; warm before."""
    unmerged(world)
    source = world.active[0]
    known = world.adapters[source]
    if known.combined:
        raise Skip
    name = add(world, known.config)
    before = world.active
    activate(world, [name])
    look(world, op, "before copying an adapter")
    originals = world.parameters([source])
    for (layer, _, letter), parameter in world.parameters([name]).items():
        parameter.data.copy_(originals[layer, source, letter].data)
    look(world, op, "copied adapter")
    if op.a % 2:
        activate(world, before)


@operation()
def set_adapter(world: World, op: Op) -> None:
    """One adapter, or two in either order."""
    unmerged(world)
    names = list(world.adapters)
    if len(names) == 1:
        names = [*names, add(world, drawn_config(op, world))]
    start = op.a % len(names)
    names = names[start:] + names[:start]
    activate(world, names[: 1 + (op.a // 4) % 2])
    look(world, op, f"{len(world.active)} active")


@operation(6)
def delete_adapter(world: World, op: Op) -> None:
    unmerged(world)
    if len(world.adapters) == 1:
        add(world, drawn_config(op, world))
    name = list(world.adapters)[-1]
    activate(world, ["default"])
    world.model.delete_adapter(name)
    del world.adapters[name]
    world.optimizers.clear()
    look(world, op, "deleted an adapter")


@operation()
def disable(world: World, op: Op) -> None:
    """The base model's outputs; a merge is taken back by the first forward pass."""
    with world.model.disable_adapter():
        world.disabled = True
        try:
            look(world, op, "disabled")
        finally:
            world.disabled = False
    has_originals(world)
    look(world, op, "enabled again")


@operation()
def combine(world: World, op: Op) -> None:
    """A weighted sum of one or two adapters as another one, which then lives on as any other."""
    unmerged(world)
    names = [name for name, known in world.adapters.items() if not known.combined][: 1 + op.a % 2]
    if len(world.adapters) > 3:
        raise Skip
    name, weights = f"adapter{len(world.adapters)}", [(1.0, 0.7, -0.4)[op.b % 3], 0.6][: len(names)]
    if name in world.adapters:
        raise Skip
    layers = world.layers(names)
    how: dict[str, Any] = {"combination_type": "svd", "svd_rank": 16} if op.b % 2 else {"combination_type": "cat"}
    try:
        world.model.base_model.add_weighted_adapter(names, weights, name, **how)
    except ValueError:
        if world.spec.shape not in UNMERGEABLE:
            raise
        return
    expected = {n: replace(one, merged=summed(one, names, weights), adapters={}) for n, one in layers.items()}
    note_combined(world, name, names)
    activate(world, [name])
    world.model.eval()
    with torch.no_grad():
        y, run = world.forward(world.input(), op.consumer)
    run.layers = expected
    world.compare_output(y, run, "combined")
    look(world, op, "combined, as any other adapter")


def summed(layer: oracle.Layer, names: list[str], weights: list[float]) -> Tensor:
    """The combined weight in float64."""
    layer = oracle.cast({"": layer}, torch.float64)[0][""]
    present = [w for name, w in zip(names, weights, strict=True) if name in layer.adapters]
    return oracle.combined(layer, present).detach()


def note_combined(world: World, name: str, names: list[str]) -> None:
    parts = [world.adapters[n] for n in names]
    layers = [layer for layer in world.weights if any(layer in part.layers for part in parts)]
    tied = {layer: next(part.tied[layer] for part in parts if layer in part.layers) for layer in layers}
    world.adapters[name] = Known(
        layers, [], dict.fromkeys(layers, 1.0), tied, parts[0].detach, parts[0].config, combined=True
    )


@operation()
def merge(world: World, op: Op) -> None:
    """Write the active adapters into the base weights, or see it refused with nothing changed."""
    unmerged(world)
    look(world, op, "before a merge")
    layers = oracle.cast(world.layers(), torch.float64)[0]
    merged = {name: oracle.compose(layer).detach() for name, layer in layers.items() if layer.adapters}
    grouped = any(layers[name].groups > 1 for name in merged)
    try:
        world.model.merge_adapter(safe_merge=op.a % 2 == 0)
    except (NotImplementedError, ValueError):
        if not grouped and world.spec.shape not in MAY_REFUSE:
            raise
        unmerge(world, op)
        return
    if grouped:
        raise Disagreement("a grouped convolution was merged")
    world.merged = merged
    look(world, op, "merged")


@operation()
def unmerge(world: World, op: Op) -> None:
    """The original weights come back bit for bit."""
    world.model.unmerge_adapter()
    has_originals(world)
    look(world, op, "unmerged")


@operation(6)
def merge_and_unload(world: World, op: Op) -> None:
    """A copy of the model is merged for good, or freed of its adapters."""
    if world.spec.shape in UNMERGEABLE | MAY_REFUSE:
        raise Skip
    unmerged(world)
    duplicate, layers = copy.deepcopy(world.model), world.layers()
    if op.a % 2:
        net = duplicate.merge_and_unload()
    else:
        net = duplicate.unload()
        layers = {name: replace(layer, adapters={}) for name, layer in layers.items()}
    net.consumer = "silu"
    with torch.no_grad():
        y, run = world.forward(world.input(), "silu", net)
    run.layers = layers
    world.compare_output(y, run, "unloaded")


def fresh_base(world: World) -> Net:
    """The base model as a user would load it again."""
    net = models.base(world.spec)
    for name, weight in world.weights.items():
        layer = getattr(net, name)
        if not isinstance(world.original(name), torch.nn.Parameter):
            setattr(net, name, copy.deepcopy(world.base_module(name)))
            continue
        shared = [n for n in world.weights if world.original(n) is world.original(name)]
        layer.weight = torch.nn.Parameter(weight.clone())
        for other in shared:
            getattr(net, other).weight = layer.weight
        bias = world.biases[name]
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.clone())
    return net.to(world.dtype)


def save(world: World, name: str) -> str:
    folder = world.place(name)
    world.model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@operation()
def save_and_load(world: World, op: Op) -> None:
    """All adapters, into a fresh base model; training goes on there."""
    unmerged(world)
    if op.a % 3:
        look(world, op, "before saving")
    folder = save(world, "saved")
    old = {key: p.detach().clone() for key, p in world.parameters(world.adapters).items()}
    options = {"is_trainable": True, "autocast_adapter_dtype": not world.first.low_precision}
    options["low_cpu_mem_usage"] = op.b % 5 == 4
    model = PeftModel.from_pretrained(fresh_base(world), folder, **options)
    for name in world.adapters:
        if name != "default":
            model.load_adapter(f"{folder}/{name}", name, **options)
    world.model = model
    world.optimizers.clear()
    for known in world.adapters.values():
        known.factor = 1.0
    activate(world, world.active)
    compare_loaded(world, old, "loaded")
    look(world, op, "loaded")


def compare_loaded(world: World, old: dict[Any, Tensor], where: str) -> None:
    """A, B and m are what they were, but for rows that are tied."""
    for (layer, adapter, letter), parameter in world.parameters({key[1] for key in old}).items():
        loose, value = ~world.adapters[adapter].tied[layer], old[layer, adapter, letter]
        one, other = parameter.detach().double(), value.double()
        if letter != "A":
            one, other = (t.reshape(-1) if letter == "m" else t.flatten(1) for t in (one, other))
            one, other = one[loose], other[loose]
        # grouped convolutions rescale m back and forth
        bound = 0.01 if parameter.dtype is torch.bfloat16 else 1e-5
        # the tiny entries that are saved for a tied row whose norm is 0 may stand in either factor
        if not torch.allclose(one, other, rtol=bound, atol=1e-8):
            raise Disagreement(f"{where}: {letter} differs")


@operation()
def load_in_plain_peft(world: World, op: Op) -> None:
    """What one adapter's folder means to PEFT itself, in single precision."""
    unmerged(world)
    name = world.active[0]
    # no folder tells a scale that was set by hand
    set_factor(world, name, 1.0)
    folder = save(world, "plain")
    folder = folder if name == "default" else f"{folder}/{name}"
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
        stored = json.load(file)
    known = {field.name for field in fields(LoraConfig) if field.init}
    config = LoraConfig(**{key: value for key, value in stored.items() if key in known and key != "auto_mapping"})
    model = PeftModel.from_pretrained(fresh_base(world).float(), folder, config=config).eval()
    if not config.use_dora or "DoraLayer" in {base.__name__ for m in model.modules() for base in type(m).__mro__}:
        raise Disagreement("the folder is not one of PEFT's use_dora")
    x = world.input().detach()
    x = x.float() if x.is_floating_point() else x
    net = model.base_model.model
    with torch.no_grad():
        y = model(x)
    network = models.network(world.spec.shape, net.consumer, {})
    expected, _ = oracle.evaluate(world.layers([name]), x, network, torch.zeros_like(y), torch.float64)
    stored_low = any(p.dtype is torch.bfloat16 for p in world.parameters([name]).values())
    # a weight that is computed from others was rounded to bf16, and is computed anew in single precision here
    stored_low = stored_low or (world.spec.shape == "computed" and world.dtype is torch.bfloat16)
    # m of a tied row is rounded when it is saved
    bound = FLOOR if stored_low else BOUNDS[torch.float32]
    check({"output": y}, {"output": expected}, {"output": bound}, "plain PEFT")


@operation()
def hotswap(world: World, op: Op) -> None:
    """The tensors of another checkpoint take the place of an adapter's, with another scaling."""
    unmerged(world)
    name = list(world.adapters)[op.a % len(world.adapters)]
    known = world.adapters[name]
    if known.combined:
        raise Skip
    look(world, op, "before a hot-swap")
    config = replace(known.config, alpha=1 + op.a % 4, seed=known.config.seed + 1 + op.b, filled=True)
    config = replace(config, detach_norm=op.b % 4 != 3)
    sibling = World(world.spec, config)
    sibling.model = get_peft_model(
        fresh_base(world), models.dora_config(config, world.spec), autocast_adapter_dtype=not config.low_precision
    )
    sibling.weights, sibling.biases = world.weights, world.biases
    sibling.note("default", config)
    folder = world.place("sibling")
    sibling.model.save_pretrained(folder, save_embedding_layers=False)
    world.model.base_model.hotswap_adapter(str(folder), name)
    known.scaling, known.detach, known.config, known.factor = (
        sibling.adapters["default"].scaling,
        config.detach_norm,
        config,
        1.0,
    )
    old = {(layer, name, letter): p.detach() for (layer, _, letter), p in sibling.parameters(["default"]).items()}
    compare_loaded(world, old, "hot-swapped")
    look(world, op, "hot-swapped")


@operation()
def cast(world: World, op: Op) -> None:
    """Another dtype; m keeps single precision at least."""
    unmerged(world)
    dtype = (torch.float64, torch.bfloat16, torch.float32)[op.a % 3]
    before = {key: p.detach().clone() for key, p in world.parameters(world.adapters).items()}
    world.model = world.model.to(dtype)
    computed = {n for n in world.weights if not isinstance(world.original(n), torch.nn.Parameter)}
    world.weights = {
        name: world.original(name).detach().clone() if name in computed else weight.to(dtype)
        for name, weight in world.weights.items()
    }
    world.biases = {name: None if bias is None else bias.to(dtype) for name, bias in world.biases.items()}
    world.optimizers.clear()
    for key, parameter in world.parameters(world.adapters).items():
        wanted = before[key].to(dtype)
        if key[2] == "m" and dtype is torch.bfloat16:
            wanted = before[key]
        tied = world.adapters[key[1]].tied[key[0]]
        # follows the norm on tied rows
        if key[2] == "m":
            wanted = torch.where(tied.view(wanted.shape), parameter.detach().to(wanted.dtype), wanted)
        if not same_bits(parameter.detach(), wanted):
            raise Disagreement(f"cast to {dtype}: {key[2]} differs")
    look(world, op, f"cast to {dtype}")


@operation()
def copy_model(world: World, op: Op) -> None:
    """A deep or a pickled copy, merged or not; then the one that is not looked at is spoilt through .data."""
    look(world, op, "before copying the model")
    # torch does not pickle parametrisations
    deep = op.a % 2 or world.spec.shape == "computed"
    duplicate = copy.deepcopy(world.model) if deep else pickle.loads(pickle.dumps(world.model))
    spoilt = world.model if op.a % 3 else duplicate
    if spoilt is world.model:
        world.model = duplicate
        world.optimizers.clear()
    for parameter in spoilt.parameters():
        put(parameter, edited(parameter.detach().clone(), 2), 0)
    look(world, op, "copied model")
