"""What measured requests amount to: medians and percentiles, JSON, a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from kt_sft.serving.bench_client import Record, Settings

PERCENTILES = (50, 90, 99)
# Row of a summary -> (title, unit, factor)
ROWS = {
    "first_token_s": ("time to first token", "ms", 1e3),
    "token_gap_s": ("time per output token", "ms", 1e3),
    "piece_gap_s": ("inter-token latency (pieces)", "ms", 1e3),
    "prefill_rate": ("prefill per request", "tokens/s", 1.0),
    "decode_rate": ("decode per request", "tokens/s", 1.0),
}


def summary(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """Everything of one measurement, ready for JSON."""
    good = [record for record in records if record.error is None]
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name != "api_key"},
        "num_requests": len(records),
        "num_errors": len(records) - len(good),
        "errors": sorted({record.error for record in records if record.error}),
        "tokens_counted_by": sorted({record.counted_by for record in good}),
        "total": _total(good),
        "per_request": {
            "first_token_s": _spread(record.first_token_s for record in good),
            "token_gap_s": _spread(record.token_gap_s for record in good),
            "piece_gap_s": _spread(gap for record in good for gap in record.piece_gaps_s),
            "prefill_rate": _spread(record.prefill_rate for record in good),
            "decode_rate": _spread(record.decode_rate for record in good),
        },
        "requests": [_row(record) for record in records],
    }


def table(report: dict[str, Any]) -> Table:
    """Rows of one measurement."""
    settings, total = report["settings"], report["total"]
    title = (
        f"{settings['model']}: prompts of {settings['prompt_tokens']} tokens, up to {settings['max_tokens']} more, "
        f"{settings['concurrent']} at a time; {report['num_requests'] - report['num_errors']} of "
        f"{report['num_requests']} requests answered"
    )
    columns = ("mean", *(f"p{q}" for q in PERCENTILES))
    result = Table("", *columns, title=escape(title), title_justify="left")
    for name, (label, unit, factor) in ROWS.items():
        spread = report["per_request"][name]
        cells = (f"{spread[column] * factor:.2f}" for column in columns) if spread else ("-" for _ in columns)
        result.add_row(f"{label}, {unit}", *cells)
    if total:
        result.add_section()
        result.add_row("prefill of all, tokens/s", f"{total['prefill_rate']:.2f}" if total["prefill_rate"] else "-")
        result.add_row("decode of all, tokens/s", f"{total['decode_rate']:.2f}" if total["decode_rate"] else "-")
        result.add_row("output over the whole time, tokens/s", f"{total['output_rate']:.2f}")
        counted = ", ".join(report["tokens_counted_by"])
        result.caption = (
            f"{total['prompt_tokens']} prompt and {total['completion_tokens']} output tokens in "
            f"{total['wall_s']:.2f} s; output tokens counted by {counted}"
        )
    return result


def _total(records: list[Record]) -> dict[str, Any]:
    """Of all requests together; the rates are of those with text: prefill up to the last first token, decode from the
    earliest on.
    """
    if not records:
        return {}
    begin, end = min(record.sent for record in records), max(record.ended or record.sent for record in records)
    prompt = sum(record.prompt_tokens for record in records)
    completion = sum(record.completion_tokens for record in records)
    with_text = [record for record in records if record.arrivals]
    firsts = [record.arrivals[0] for record in with_text]
    prefill_s = max(firsts) - begin if firsts else 0.0
    decode_s = max(record.last_token_at for record in with_text) - min(firsts) if firsts else 0.0
    further = sum(record.completion_tokens - 1 for record in with_text)
    return {
        "wall_s": end - begin,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prefill_rate": sum(record.prompt_tokens for record in with_text) / prefill_s if prefill_s else None,
        "decode_rate": further / decode_s if decode_s else None,
        "output_rate": completion / (end - begin) if end > begin else 0.0,
        "requests_per_s": len(records) / (end - begin) if end > begin else 0.0,
    }


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles of those that are known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return {"mean": statistics.fmean(known), **{f"p{q}": percentile(known, q) for q in PERCENTILES}}


def percentile(ordered: list[float], q: float) -> float:
    """Between the two nearest of `ordered`, as numpy has it."""
    at = (len(ordered) - 1) * q / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def _row(record: Record) -> dict[str, Any]:
    derived = ("first_token_s", "token_gap_s", "prefill_rate", "decode_rate")
    return {**asdict(record), **{name: getattr(record, name) for name in derived}}
