"""Plans and forecasts as text."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from hourglass_dist.core.text import show_bytes, show_count, show_duration
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.failures import DAY, Return, goodput, longest_interval
from hourglass_dist.planning.forecast import (
    CONTEXT,
    FRAGMENTS,
    LINKS,
    PRODUCTS,
    WRITES,
    Cluster,
    Forecast,
)
from hourglass_dist.planning.plan import Plan


def render_plan(plan: Plan) -> str:
    """Return the plan as text, 100 columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    for part in describe(plan):
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def describe(plan: Plan) -> list[str | Table]:
    """Return the plan as lines of text and tables."""
    return [_headline(plan), _level_table(plan), _rank_table(plan), _summary(plan)]


def _headline(plan: Plan) -> str:
    config = plan.config
    return (
        f"{config.model.hierarchy}, {_widths(config.model)}: "
        f"{plan.parameters.total:,} parameters, rows of {config.data.longest} tokens, "
        f"{config.train.precision}, ZeRO-{config.deepspeed.stage}, ranks: {plan.world_size}"
        f"{f' x {plan.device}' if plan.device else ''}"
    )


def _widths(model: ModelConfig) -> str:
    widths = [level.dim for level in model.levels]
    if len(set(widths)) == 1:
        return f"width {widths[0]}"
    return "widths " + ", ".join(map(str, widths))


def _level_table(plan: Plan) -> Table:
    parameters, flops, held = plan.parameters, plan.flops, plan.activations
    table = Table(title="Model", title_justify="left")
    table.add_column("level")
    for name in ("stride", "parameters", "FLOPs/token", "share"):
        table.add_column(name, justify="right")
    if held:
        table.add_column("activations", justify="right")
    table.add_column("checkpointing")

    def add(name: str, stride: str, count: int, share: float, size: int, policy: str = "") -> None:
        shown = show_count(share * flops.forward_per_token), f"{100 * share:.1f} %"
        table.add_row(
            name, stride, f"{count:,}", *shown, *([show_bytes(size)] if held else []), policy
        )

    whole = flops.forward_per_token * flops.length
    levels = zip(plan.config.model.levels, flops.levels, strict=True)
    for index, (level, cost) in enumerate(levels):
        count, size = parameters.of_level(index), held.levels[index].kept if held else 0
        policy = level.activation_checkpointing
        add(f"level {index}", str(cost.stride), count, cost.forward / whole, size, policy)
    size = held.ends.kept if held else 0
    add("embeddings, output", "1", parameters.of_level(None), flops.head / whole, size)
    if held:
        largest = max(held.parts, key=lambda part: part.transient)
        name = "loss, for a moment" if largest is held.ends else "one recomputed layer"
        table.add_row(name, "", "", "", "", show_bytes(largest.transient))
    table.add_section()
    add("all", "", parameters.total, 1.0, held.total if held else 0)
    return table


def _rank_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(title="One rank", title_justify="left")
    table.add_column("memory")
    table.add_column("bytes", justify="right")
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer: fp32 weights": memory.master,
        "optimizer: moments": memory.moments,
        "gathered weights": memory.gathered,
        "buffers": memory.buffer,
    }
    if plan.activations:
        rows["activations"] = memory.activations
    for name, value in rows.items():
        table.add_row(name, show_bytes(value))
    table.add_section()
    if memory.host:
        table.add_row("in the host's memory", show_bytes(memory.host))
    if memory.files:
        table.add_row("in files", show_bytes(memory.files))
    name = "in all on the device" if memory.host else "in all"
    name += "" if plan.activations else ", without activations"
    table.add_row(name, show_bytes(memory.total))
    return table


def _summary(plan: Plan) -> str:
    flops, config = plan.flops, plan.config
    recomputed = ""
    if flops.recomputed:
        recomputed = f", {show_count(flops.hardware_per_token)} with recomputation"
    return (
        f"A step: {plan.tokens_per_step:,} tokens; each rank runs {plan.micro_batches} x "
        f"{config.train.micro_batch_size} rows and sends {show_bytes(plan.traffic.total)}.\n"
        f"A token: {show_count(flops.training_per_token)} FLOPs forward and backward"
        f"{recomputed}.\n"
        f"The run: {config.train.steps:,} steps, {show_count(plan.tokens)} tokens, "
        f"{show_count(plan.training_flops)} FLOPs."
    )


def render_forecast(forecast: Forecast, best: Forecast | None, least: Forecast | None) -> str:
    """Return the forecast of the settings, and the suggested settings, as text."""
    lines = [
        _machine_line(forecast.cluster),
        _memory_line(forecast),
        *_time_lines(forecast),
        *_assumption_lines(forecast),
    ]
    if best is None and least is not None:
        needed = show_bytes(round(least.memory))
        lines.append(f"Nothing fits: the least is {needed} with {_described(least)}; more nodes?")
    elif best is not None and _described(best) == _described(forecast):
        lines.append("Suggested: these settings.")
    elif best is not None:
        gain = forecast.step_s / best.step_s
        than = f"{gain:.2f} x as fast" if forecast.fits else f"{best.step_s:.3g} s a step"
        lines.append(
            f"Suggested: {_described(best)}: {show_bytes(round(best.memory))}, {than}.",
        )
    return "\n".join(lines) + "\n"


def _machine_line(machines: Cluster) -> str:
    return f"On {machines.nodes} x {machines.gpus_per_node} {machines.device.name}:"


def _memory_line(forecast: Forecast) -> str:
    memory, has = forecast.plan.memory, show_bytes(round(forecast.cluster.node.memory))
    needs = f"{show_bytes(round(forecast.memory))} of {has}"
    if forecast.fits:
        return f"  fits: {needs} on each"
    parts = {
        "weights": memory.weights + memory.gathered,
        "gradients and their buffers": memory.gradients + memory.buffer,
        "optimizer": memory.master + memory.moments,
        "activations": memory.activations,
    }
    largest = max(parts, key=parts.__getitem__)
    return f"  does not fit: {needs} on each, {show_bytes(parts[largest])} of it {largest}"


def _time_lines(forecast: Forecast) -> Iterator[str]:
    made, join = forecast.plan, "or" if forecast.overlaps else "+"
    yield (
        f"  a step: {forecast.step_s:.3g} s (products {forecast.products_s:.3g} {join} collectives "
        f"{forecast.collectives_s:.3g}, then the optimizer {forecast.optimizer_s:.3g})"
    )
    lasts = show_duration(3600 * forecast.gpu_hours / forecast.cluster.gpus)
    yield (
        f"  the run: {show_count(forecast.tokens_per_day)} tokens a day, {lasts}, "
        f"{forecast.gpu_hours:,.0f} GPU-hours{_price(forecast)}"
    )
    seconds = made.checkpoint_bytes / WRITES
    yield f"  a checkpoint: {show_bytes(made.checkpoint_bytes)}, {seconds:,.1f} s to write"
    yield _failure_line(forecast)


def _failure_line(forecast: Forecast) -> str:
    """Return the line with the expected failures and the checkpoint interval."""
    saving, back, mtbf = forecast.saving, Return(), forecast.mtbf_s
    most = max(1, round(longest_interval(saving, back, mtbf) / forecast.step_s))
    now = forecast.plan.config.checkpoint.every
    share = goodput(now * forecast.step_s, saving, back, mtbf)
    return (
        f"  failures: {7 * DAY / mtbf:.2g} a week; checkpoint.every: {now:,} leaves {share:.2%} of "
        f"the time; up to {most:,} is as good"
    )


def _price(forecast: Forecast) -> str:
    price = forecast.cluster.price
    if price is None:
        return " (no listed price: give --price)"
    return f", ${forecast.gpu_hours * price:,.0f} at ${price:.2f} an hour"


def _assumption_lines(forecast: Forecast) -> Iterator[str]:
    how = "the longer of both" if forecast.overlaps else "their sum"
    yield (
        f"  assumed: products at {PRODUCTS:.0%} of the peak, links at {LINKS:.0%}, {how}; files at "
        f"{WRITES / 1e9:.0f} GB/s;"
    )
    if forecast.plan.memory.host:
        yield "  not counted: what goes to the host's memory and back, and the optimizer there"
    yield f"  {FRAGMENTS:.0%} of memory and {show_bytes(CONTEXT)} go to fragments and the context"


def _described(forecast: Forecast) -> str:
    config = forecast.plan.config
    policies = config.model.checkpointing
    shown = policies[0] if len(set(policies)) == 1 else ", ".join(policies)
    return (
        f"ZeRO stage {config.deepspeed.stage}, micro batches of {config.train.micro_batch_size}, "
        f"checkpointing {shown}"
    )
