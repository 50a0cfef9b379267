"""`kt-sft serve` and `kt-sft bench serve`. Web packages are imported when a command runs."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from kt_sft import env
from kt_sft.cli.console import errors_in_one_line, seconds
from kt_sft.errors import ConfigError
from kt_sft.formats.staging import write_text

if TYPE_CHECKING:
    from kt_sft.serving.bench_client import Settings

bench_app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure a running system.")


@bench_app.callback()
def bench() -> None:
    """Measure a running system."""


def serve(
    config: Annotated[Path, typer.Argument(help="LLaMA-Factory's YAML for chat, as llamafactory-cli takes it.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key that requests must bring; or KT_SFT_API_KEY.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name by which clients address it without a key; may be repeated.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name in requests; default: the directory's.")] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Answers that are written at the same time.")] = 4,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot.")] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.001, callback=seconds, help="Seconds for one answer, waiting included.")
    ] = 600.0,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens between two chances to stop.")] = 512,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
) -> None:
    """Serve a model on OpenAI's and Ollama's routes; Ctrl-C ends it. Exit code 2 on errors."""
    with errors_in_one_line("serve"):
        _require("serve", "fastapi", "uvicorn", "llamafactory")
        is_stopped = _serve(
            config, (host, port), log_level,
            {"model_name": model_name, "prefill_chunk": prefill_chunk},
            {"slots": slots, "max_waiting": max_waiting, "timeout_s": timeout},
            {"api_key": _key(api_key), "allowed_hosts": allowed_host or ()},
        )  # fmt: skip
    if not is_stopped:  # a thread is inside a long computation; Python would wait for it, and a second signal crash it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _key(given: str | None) -> str | None:
    """The key of the option or else of the variable; none only where neither is there."""
    from kt_sft.serving.access import key_bytes

    key, origin = (env.api_key(), "KT_SFT_API_KEY") if given is None else (given, "--api-key")
    if key is not None:
        key_bytes(key, origin)
    return key


def _serve(
    path: Path,
    address: tuple[str, int],
    log_level: str,
    model: dict[str, Any],
    limits: dict[str, Any],
    access: dict[str, Any],
) -> bool:
    levels = ("critical", "error", "warning", "info", "debug")
    if log_level not in levels:
        raise ConfigError(f"--log-level: expected one of {', '.join(levels)}, found {log_level!r}")
    from kt_sft.serving.access import Hosts
    from kt_sft.serving.allocator import use_one_arena
    from kt_sft.serving.server import Server, bind

    use_one_arena()
    Hosts.of("127.0.0.1", access["allowed_hosts"])  # the names are checked before a model is loaded
    console = Console(stderr=True)
    with bind(*address) as sock:
        from kt_sft.integrations.llamafactory import chat

        backend = chat.load(chat.read_run_file(path), **model)
        from kt_sft.serving.engine import Engine

        logging.getLogger("kt_sft").setLevel(log_level.upper())
        host, port = sock.getsockname()[:2]
        if access["api_key"] is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            console.print(f"listening on {host} without a key: everybody who reaches it may use it; see --api-key")
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        console.print(f"kt-sft serve: {escape(', '.join(backend.facts.names))} on {url}", soft_wrap=True)
        return Server(Engine(backend, **limits), sock, **access, log_level=log_level).serve_until_stopped()


@bench_app.command("serve")
def bench_serve(
    api_url: Annotated[str, typer.Option(help="Of an OpenAI-compatible server, with or without /v1.")],
    model: Annotated[str, typer.Option(help="Name of the model there.")],
    prompt_lens: Annotated[str, typer.Option(help="Tokens of the prompts; several with commas.")] = "1024",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    num_requests: Annotated[int | None, typer.Option(min=1, help="Of each length; default: as --concurrent.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Ask for exactly --max-tokens.")] = False,
    api_key: Annotated[str | None, typer.Option(help="Key of the server; or KT_SFT_API_KEY.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, callback=seconds, help="Seconds for one request.")] = 3600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Measure prefill, decoding and latencies of any OpenAI-compatible server.

    Exit code 1 if no request of any length was answered, 2 if the server cannot be measured.
    """
    with errors_in_one_line("bench serve"):
        _require("bench serve", "httpx")
        from kt_sft.serving.bench_client import Settings

        common = {
            "url": api_url, "model": model, "max_tokens": max_tokens, "concurrent": concurrent,
            "num_requests": num_requests or concurrent, "ignores_eos": ignore_eos,
            "api_key": api_key or (env.api_key() or "").strip() or None, "timeout_s": timeout, "seed": seed,
        }  # fmt: skip
        reports = [_measure(Settings(prompt_tokens=tokens, **common)) for tokens in _lengths(prompt_lens)]
        if json_file is not None:
            write_text(json_file, json.dumps({"measurements": reports}, indent=1) + "\n")
    if all(report["num_errors"] == report["num_requests"] for report in reports):
        raise typer.Exit(1)


def _measure(settings: Settings) -> dict[str, Any]:
    """Run and show one measurement."""
    from kt_sft.serving.bench_client import Bench, Record
    from kt_sft.serving.bench_report import summary, table

    console = Console()
    done: list[Record] = []
    with console.status("probing the server") as status:

        def progress(record: Record) -> None:
            done.append(record)
            status.update(f"{len(done)} of {settings.num_requests} requests")

        report = summary(settings, asyncio.run(Bench(settings).run(progress)))
    console.print(table(report))
    for error in report["errors"]:
        count = sum(request["error"] == error for request in report["requests"])
        console.print(f"[bold red]{count} failed[/bold red]: {escape(error)}", soft_wrap=True)
    return report


def _lengths(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--prompt-lens: expected numbers of tokens, as 128,1024; found {text!r}")
    return [int(word) for word in words]


def _require(command: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"kt-sft {command} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "in a clone: pip install '.[serve,llamafactory]'"
        )
