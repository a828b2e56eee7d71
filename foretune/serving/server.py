"""A model folder becomes an address: everything in order, and everything undone in order.

checks ──▶ port held ──▶ engine starts ─┬─▶ tokenizer, template ──▶ front listens (503) ─┬─▶ ready ──▶ until stopped
                                        └───────────── model loads ──────────────────────┘

Whoever holds the port says what is wrong before a model of many gigabytes is loaded for nothing.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.errors import MachineFault, UserError
from foretune.logger import get_logger
from foretune.serving.engines import RunningEngine, choose_engine, dialect_of
from foretune.serving.model import check_folder, read_model

_log = get_logger(__name__)

_NEEDED = {"starlette", "uvicorn", "httpx2", "fastapi", "openai"}  # the last two: `transformers serve` needs them
_WATCH_SECONDS = 0.5
_FINISH_SECONDS = 5  # what answers under way get when the server is stopped


def serve(
    model_folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    engine: str = "auto",
    served_name: str | None = None,
    max_request_bytes: int = 1 << 20,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    Args:
        model_folder: Hugging Face folder of a whole model (no bare adapter).
        host: address to listen on. Other than loopback demands `api_key`.
        port: 0 takes a free one.
        api_key: bearer token that clients must send; None asks for none.
        engine: ``transformers``, ``vllm``, or ``auto``: vLLM where it is installed and a GPU is there.
        served_name: what clients call the model; None takes the folder's name (the run's, for RUN/export).
        max_request_bytes: larger requests are answered with 413.
        on_ready: called once with the base URL, e.g. ``http://127.0.0.1:8000/v1``, when the model answers.

    Raises:
        UserError: missing packages, no key for an open address, a port that is taken, a folder that can't be served,
            a chat template that is not the exported one.
        MachineFault: the engine ended; carries the end of its log.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    # SIGTERM becomes KeyboardInterrupt too, so that it is obeyed at every step, loading included.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        with _start(
            model_folder, host=host, port=port, api_key=api_key, engine=engine, served_name=served_name,
            max_request_bytes=max_request_bytes,
        ) as server:  # fmt: skip
            _log.info("%s answers at %s (Ctrl-C stops it)", server.name, server.base_url)
            if on_ready is not None:
                on_ready(server.base_url)
            server.wait()
    except KeyboardInterrupt:
        _log.info("stopped as asked")
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running_server(
    model_folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    engine: str = "auto",
    served_name: str | None = None,
    max_request_bytes: int = 1 << 20,
) -> Iterator[str]:
    """Serve a model for as long as the context lasts; yields the base URL of a server that answers.

    Arguments and errors: `serve`; the port is a free one unless given.
    """
    with _start(
        model_folder, host=host, port=port, api_key=api_key, engine=engine, served_name=served_name,
        max_request_bytes=max_request_bytes,
    ) as server:  # fmt: skip
        yield server.base_url


@dataclass(frozen=True)
class _RunningServer:
    """A server that answers. `base_url` is what an OpenAI client takes, e.g. ``http://127.0.0.1:8000/v1``."""

    base_url: str
    name: str
    engine: RunningEngine
    thread: threading.Thread

    def wait(self) -> None:
        """Block for as long as it answers. Raises `MachineFault` when the engine or the front ends."""
        while True:
            self.engine.check()
            if not self.thread.is_alive():
                raise MachineFault("the server's front ended by itself")
            time.sleep(_WATCH_SECONDS)


@contextlib.contextmanager
def _start(
    model_folder: Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    engine: str,
    served_name: str | None,
    max_request_bytes: int,
) -> Iterator[_RunningServer]:
    """The steps of the module's head. Entered once the model answers; leaving undoes them. See `serve`."""
    _check_extra()
    _check_arguments(host, api_key=api_key, served_name=served_name, max_request_bytes=max_request_bytes)
    check_folder(model_folder)
    name = choose_engine(engine)
    with contextlib.closing(_listen(host, port)) as listener:
        _log.info("starting %s on %s", name, model_folder)
        with RunningEngine.start(name, model_folder) as running:
            model = read_model(model_folder, name=served_name)
            for note in model.notes:
                _log.warning("%s: %s", model.name, note)
            is_open_loopback = _is_loopback(host) and api_key is None
            from foretune.serving.front import Front

            front = Front(
                model,
                dialect_of(name),
                socket=running.socket,
                api_key=api_key,
                max_request_bytes=max_request_bytes,
                hosts=["localhost"] if is_open_loopback else None,
            )
            with _listening(front, listener) as thread:
                running.wait_until_ready()
                front.ready = True
                yield _RunningServer(_base_url(host, listener), model.name, running, thread)


@contextlib.contextmanager
def _listening(app: Any, listener: socket.socket) -> Iterator[threading.Thread]:
    """Run an ASGI application on a bound socket in a thread of its own."""
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=_FINISH_SECONDS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="foretune-front", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise MachineFault("the server's front did not start; its log says why")
        yield thread
    finally:
        server.should_exit = True
        thread.join(timeout=_FINISH_SECONDS + 5)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:  # getaddrinfo would take it modulo 65,536 without a word
        raise UserError("--port", port, "is no port", "give one from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UserError("--host", host, f"can't be listened on: {error}", "give an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for old connections
        listener.bind(address)
        listener.listen(2048)  # at once: two sockets that only bind can both hold the same port
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError("--host", host, f"can't be had: {reason}", "give an address of this machine") from None
        raise UserError(
            "--port", port, f"{host}:{port} can't be had: {reason}", "stop what holds it, or give another --port"
        ) from None
    return listener


def _base_url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/v1"


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address (every address that a name stands for)."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return bool(host) and all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def _check_extra() -> None:
    missing = sorted(name for name in _NEEDED if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(
            "serve",
            ", ".join(missing),
            "packages that serving needs are not installed",
            'pip install "foretune[serve]"',
        )


def _check_arguments(host: str, *, api_key: str | None, served_name: str | None, max_request_bytes: int) -> None:
    if api_key is None and not _is_loopback(host):
        raise UserError(
            "--api-key", None, f"{host} can be reached from other machines, and there is no key",
            "give --api-key, or leave --host out to answer this machine only",
        )  # fmt: skip
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        # The value is a secret, even a useless one: it is not repeated.
        raise UserError("--api-key", "…", "is empty or can't be sent in a header", "use printable ASCII without blanks")
    if served_name is not None and not (served_name.strip() and served_name.isprintable()):
        raise UserError("--served-name", served_name, "is no name", "use printable characters")
    if max_request_bytes < 1:
        raise UserError("--max-request-bytes", max_request_bytes, "must be at least 1", "leave it out for 1 MiB")
