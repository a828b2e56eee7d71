"""The front over real sockets, with a scripted engine behind it: what passes, what does not, and what is made of it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from foretune.serving.dialects import TransformersDialect
from foretune.serving.front import Front
from foretune.serving.model import ServedModel

LIMIT = 20_000
CONTEXT = 100
KEY = "s3cret-key"


class WordTokenizer:
    """One token a word; the template refuses a system message, as some do."""

    chat_template: str | None = "{{ messages }}"

    def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}

    def apply_chat_template(self, conversation: Any, tools: Any = None, chat_template: Any = None, **_: Any) -> Any:
        if any(message["role"] == "system" for message in conversation):
            raise ValueError("no system message here")
        return {"input_ids": list(range(sum(len(message["content"].split()) + 2 for message in conversation)))}


class ScriptedEngine:
    """Speaks as `transformers serve` does, and does what the prompt's first word says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bodies: list[dict[str, Any]] = []
        self.go_on = threading.Event()
        self.cancelled = threading.Event()
        self.other_routes: list[str] = []
        self.app = Starlette(
            routes=[
                Route("/v1/{kind:path}", self.answer, methods=["POST"]),
                Route("/health", lambda _: JSONResponse({"status": "ok"})),
                Route("/{path:path}", self.other, methods=["GET", "POST"]),
            ]
        )

    async def other(self, request: Request) -> Response:
        self.other_routes.append(request.url.path)
        return PlainTextResponse("open")

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        is_chat = "messages" in body
        text = body["messages"][-1]["content"] if is_chat else body["prompt"]
        command, *words = text.split()
        if command == "crash":
            return PlainTextResponse("Internal Server Error", status_code=500)
        if command == "refuse":
            return JSONResponse({"detail": "Unexpected fields in the request: {'x'}"}, status_code=422)
        return StreamingResponse(self.events(command, words, is_chat), media_type="text/event-stream")

    async def events(self, command: str, words: list[str], is_chat: bool) -> Any:
        def event(text: str | None, finish: str | None = None) -> str:
            part = {"delta": {} if text is None else {"content": text}} if is_chat else {"text": text or ""}
            chunk = {"id": "1", "created": 1, "model": "model@main", "choices": [{"index": 0, **part}]}
            if finish:
                chunk["choices"][0]["finish_reason"] = finish  # type: ignore[index]
                chunk["usage"] = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}
            return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

        if command == "break":
            yield event("half")
            raise RuntimeError("the engine is gone")  # uvicorn closes the connection in the middle
        if command == "fail":
            yield event(None)
            yield 'data: {"error": "the "model" is tired"}\n\n'
            return
        if command == "wait":
            yield event("first")
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
        if command == "endless":
            try:
                while True:
                    yield event("more ")
                    await asyncio.sleep(0.01)
            finally:
                self.cancelled.set()
        for word in words:
            yield event(word + " ")
        yield event(None, "stop")


class ServerThread:
    """uvicorn in a thread, on a Unix socket or on a free port."""

    def __init__(self, app: Any, **where: Any) -> None:
        # Named as TCP, or asyncio leaves Nagle's algorithm on: 40 ms on every answer.
        self.listener = None if where else socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if self.listener is not None:
            self.listener.bind(("127.0.0.1", 0))
            self.listener.listen(64)
        config = uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=1, **where)
        self.server = uvicorn.Server(config)
        sockets = None if self.listener is None else [self.listener]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": sockets}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.005)

    @property
    def url(self) -> str:
        assert self.listener is not None
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()


def make_front(engine: Path, *, api_key: str | None = None, hosts: list[str] | None = None) -> Front:
    model = ServedModel(
        folder=Path("/nowhere"), name="tuned", tokenizer=WordTokenizer(), context_length=CONTEXT, vocab_size=50,
        generation={"eos_token_id": 7},
    )  # fmt: skip
    front = Front(model, TransformersDialect(), socket=engine, api_key=api_key, max_request_bytes=LIMIT, hosts=hosts)
    front.ready = True
    return front


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedEngine]:
    scripted = ScriptedEngine(tmp_path_factory.mktemp("s") / "e.sock")
    thread = ServerThread(scripted.app, uds=str(scripted.path))
    yield scripted
    thread.stop()


@pytest.fixture(scope="module")
def url(engine: ScriptedEngine) -> Iterator[str]:
    thread = ServerThread(make_front(engine.path, hosts=["localhost"]))
    yield thread.url
    thread.stop()


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=10) as made:
        yield made


def complete(http: httpx2.Client, **body: Any) -> httpx2.Response:
    return http.post("/v1/completions", json={"model": "tuned", "prompt": "say a b", **body})


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """Every error must have OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("invalid_request_error" if answer.status_code < 500 else "server_error")
    return error


# ── what passes ───────────────────────────────────────────────────────────────────────────────────────


def test_a_plain_answer_has_the_public_name_and_the_usage(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(model="tuned", prompt="say one two")
    assert answer.choices[0].text == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tuned"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert engine.bodies[-1]["model"] == "model"


def test_a_chat_answer_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tuned", "messages": [{"role": "user", "content": "say one two"}]}
    whole = client.chat.completions.create(**asked)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.content == "one two "
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two "
    assert {chunk.model for chunk in chunks} == {"tuned"}
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_is_passed_on_at_once_and_ends_with_done(http: httpx2.Client, engine: ScriptedEngine) -> None:
    engine.go_on.clear()
    body = {"model": "tuned", "prompt": "wait second", "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = answer.iter_bytes()
        first = next(pieces)
        assert b"first" in first  # while the engine still waits for us
        assert b"second" not in first
        engine.go_on.set()
        rest = b"".join(pieces)
    assert b"second" in rest
    assert rest.endswith(b"data: [DONE]\n\n")


def test_a_stop_text_is_left_out_of_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tuned", prompt="say one two END three", stop=["o END", "END"])
    assert answer.choices[0].text == "one tw"
    chunks = client.completions.create(model="tuned", prompt="say one two", stop="two and more", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two "  # held back, then given after all


def test_the_list_of_models_is_ours(client: openai.OpenAI, http: httpx2.Client) -> None:
    assert [model.id for model in client.models.list()] == ["tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    assert error_of(http.get("/v1/models/gpt2"))["code"] == "model_not_found"


# ── what does not ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/load_model", 404),
        ("POST", "/reset", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/systemone", 404),
        ("POST", "/v1/audio/transcriptions", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "//v1/completions", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tuned", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_other_routes_are_closed(
    http: httpx2.Client, engine: ScriptedEngine, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path, json={"model": "tuned", "prompt": "say x"})
    assert answer.status_code == status
    error_of(answer)
    assert engine.other_routes == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"3", b"null", b'{"model": NaN}', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 9000,
     b'{"model": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_malformed_bodies_are_400(http: httpx2.Client, content: bytes) -> None:
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error_of(answer)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3), ("prompt", {}), ("prompt", ["a", "b"]), ("prompt", [1, 2]), ("prompt", ""), ("prompt", None),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "8"), ("max_tokens", 1.5), ("max_tokens", True),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.1),
        ("n", 0), ("n", 2), ("best_of", 3), ("echo", True), ("logprobs", 3), ("seed", 2**70), ("seed", "x"),
        ("stop", ""), ("stop", [""]), ("stop", 3), ("stop", ["x"] * 17), ("stream", "yes"), ("presence_penalty", 0.5),
        ("frequency_penalty", 1.0), ("logit_bias", {"50": 1.0}), ("logit_bias", {"-1": 1}), ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 1000}), ("generation_config", "{}"), ("model", None), ("model", ""), ("model", 3),
    ],
)  # fmt: skip
def test_bad_parameters_are_400_and_named(
    http: httpx2.Client, engine: ScriptedEngine, field: str, value: object
) -> None:
    before = len(engine.bodies)
    answer = complete(http, **{field: value})
    assert answer.status_code == 400
    assert (error_of(answer)["param"] or "").startswith(field)
    assert len(engine.bodies) == before, "the engine must not see it"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", "hi"), ("messages", [{"content": "no role"}]), ("messages", [3]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
        ("messages", [{"role": "system", "content": "the template refuses this"}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"function": {}}]}]),
        ("response_format", {"type": "json_object"}), ("logprobs", True), ("tool_choice", "required"),
        ("reasoning_effort", "high"), ("chat_template", "{{ evil }}"), ("tools", "x"),
        ("chat_template_kwargs", {"chat_template": "{{ evil }}"}), ("chat_template_kwargs", {"conversation": []}),
    ],
)  # fmt: skip
def test_bad_chat_parameters_are_400_and_named(
    http: httpx2.Client, engine: ScriptedEngine, field: str, value: object
) -> None:
    before = len(engine.bodies)
    messages = [{"role": "user", "content": "say x"}]
    answer = http.post("/v1/chat/completions", json={"model": "tuned", "messages": messages, field: value})
    assert answer.status_code == 400
    assert (error_of(answer)["param"] or "").startswith(field)
    assert len(engine.bodies) == before


def test_what_changes_nothing_is_accepted(http: httpx2.Client, engine: ScriptedEngine) -> None:
    answer = complete(http, n=1, best_of=1, presence_penalty=0, frequency_penalty=0.0, user="me", logprobs=None,
                      stream_options=None, prompt=["say a"])  # fmt: skip
    assert answer.status_code == 200
    assert set(engine.bodies[-1]) == {"model", "prompt", "stream", "max_tokens", "generation_config"}


def test_another_model_is_404(http: httpx2.Client) -> None:
    answer = complete(http, model="gpt2")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


def test_what_does_not_fit_the_context_is_400(http: httpx2.Client, engine: ScriptedEngine) -> None:
    for body in ({"prompt": "say " + "x " * CONTEXT}, {"max_tokens": CONTEXT - 2}, {"max_tokens": 10**15}):
        answer = complete(http, **body)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"
    assert complete(http, max_tokens=CONTEXT - 3).status_code == 200
    assert complete(http).status_code == 200
    assert engine.bodies[-1]["max_tokens"] == CONTEXT - 3, "an answer may fill the context and no more"


def test_oversized_bodies_are_413_whether_their_length_is_said_or_not(http: httpx2.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    for content in (b"x" * (LIMIT + 1), b"x" * (3 * LIMIT), pieces()):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "request_too_large"
    fitting = json.dumps({"model": "tuned", "prompt": "say x", "user": "u" * (LIMIT - 60)}).encode()
    assert len(fitting) <= LIMIT
    assert http.post("/v1/completions", content=fitting, headers=headers).status_code == 200


def test_a_body_that_never_ends_is_not_read_for_ever(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"%x\r\n%s\r\n" % (8192, b"x" * 8192)
        sent = 0
        try:
            while sent < 64 << 20:  # far more than the buffers between us hold
                raw.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < 64 << 20


def test_only_json_is_taken_so_that_no_web_page_can_ask(http: httpx2.Client) -> None:
    content = json.dumps({"model": "tuned", "prompt": "say x"}).encode()
    answer = http.post("/v1/completions", content=content, headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    error_of(answer)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("LOCALHOST:1", 200), ("evil.example", 403),
     ("localhost.evil.example", 403), ("10.0.0.1", 403)],
)  # fmt: skip
def test_without_a_key_only_local_names_are_answered(http: httpx2.Client, host: str, status: int) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == status


def test_the_key(engine: ScriptedEngine, capfd: pytest.CaptureFixture[str]) -> None:
    thread = ServerThread(make_front(engine.path, api_key=KEY))
    try:
        with httpx2.Client(base_url=thread.url) as http:
            for header in (None, "", KEY, f"bearer {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Basic abc"):
                headers = {} if header is None else {"authorization": header}
                for path in ("/v1/models", "/load_model"):
                    answer = http.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert error_of(answer)["code"] == "invalid_api_key"
                    assert KEY not in answer.text
            assert http.get("/health").status_code == 200
            assert http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
            assert http.get("/reset", headers={"authorization": f"Bearer {KEY}"}).status_code == 404
    finally:
        thread.stop()
    assert KEY not in "".join(capfd.readouterr())


# ── what goes wrong behind ────────────────────────────────────────────────────────────────────────────


def test_errors_of_the_engine(http: httpx2.Client) -> None:
    crashed = complete(http, prompt="crash")
    assert crashed.status_code == 502
    assert error_of(crashed)["code"] == "engine_error"
    refused = complete(http, prompt="refuse")
    assert refused.status_code == 400
    assert "Unexpected fields" in error_of(refused)["message"]
    failed = complete(http, prompt="fail")
    assert failed.status_code == 502
    assert 'the "model" is tired' in error_of(failed)["message"]
    broken = complete(http, prompt="break")
    assert broken.status_code == 502
    assert error_of(broken)["code"] == "engine_unavailable"


@pytest.mark.parametrize("command", ["break", "fail"])
def test_an_error_inside_a_stream_is_said_there(http: httpx2.Client, client: openai.OpenAI, command: str) -> None:
    body = {"model": "tuned", "prompt": command, "stream": True}
    text = http.post("/v1/completions", json=body).text
    assert "[DONE]" not in text
    last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    with pytest.raises(openai.APIError):
        list(client.completions.create(model="tuned", prompt=command, stream=True))


def test_a_dead_engine_is_502_and_unhealthy(tmp_path: Path) -> None:
    thread = ServerThread(make_front(tmp_path / "nobody.sock"))
    try:
        with httpx2.Client(base_url=thread.url) as http:
            answer = complete(http)
            assert answer.status_code == 502
            assert error_of(answer)["code"] == "engine_unavailable"
            assert http.get("/health").status_code == 503
    finally:
        thread.stop()


def test_while_the_model_loads_the_answer_is_503(engine: ScriptedEngine) -> None:
    front = make_front(engine.path)
    front.ready = False
    thread = ServerThread(front)
    try:
        with httpx2.Client(base_url=thread.url) as http:
            answer = complete(http)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert error_of(answer)["code"] == "loading"
            assert http.get("/health").status_code == 503
            front.ready = True
            assert complete(http).status_code == 200
    finally:
        thread.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(url: str, engine: ScriptedEngine, stream: bool) -> None:
    engine.cancelled.clear()
    with httpx2.Client(base_url=url, timeout=0.3) as impatient:
        body = {"model": "tuned", "prompt": "endless", "stream": stream}
        if stream:
            with impatient.stream("POST", "/v1/completions", json=body) as answer:
                pieces = answer.iter_bytes()  # kept: an iterator that is thrown away closes the connection
                next(pieces)
                time.sleep(0.1)
                assert not engine.cancelled.is_set()
        else:
            with pytest.raises(httpx2.ReadTimeout):
                impatient.post("/v1/completions", json=body)
    assert engine.cancelled.wait(timeout=5), "the engine went on for nobody"


def test_twenty_at_once_wait_for_nobody(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.go_on.clear()
    answers: list[str] = []

    def ask(index: int) -> None:
        answers.append(client.completions.create(model="tuned", prompt=f"wait w{index}").choices[0].text)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    assert client.completions.create(model="tuned", prompt="say now").choices[0].text == "now "
    assert answers == []
    engine.go_on.set()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(answers) == sorted(f"firstw{index} " for index in range(20))
