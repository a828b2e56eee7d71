"""A real server (`transformers serve` behind the front) asked by the official OpenAI client, and a real chat."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from foretune.errors import UserError
from foretune.serving import chat, running_server

TINY = Path(__file__).parents[1] / "models" / "stories260K"
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
KEY = "road-test-key-4711"
QUESTION: Any = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, given a chat template."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("served") / "tiny@1: stories")  # a name that engines dislike
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # two threads on two busy cores wait for each other at every layer
        started = time.monotonic()
        with running_server(model, served_name="tiny", api_key=KEY, max_request_bytes=100_000) as base_url:
            print(f"ready after {time.monotonic() - started:.1f} s")
            yield base_url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def generate(model: Path, tokens: Any, max_new_tokens: int) -> str:
    """What plain transformers says, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([tokens])
    whole = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return str(AutoTokenizer.from_pretrained(model).decode(whole[0, len(tokens) :], skip_special_tokens=True))


# ── the official client ───────────────────────────────────────────────────────────────────────────────


def test_chat_says_what_the_model_says_under_its_own_template(client: openai.OpenAI, model: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30)
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokens), 30)
    assert answer.choices[0].message.content == generate(model, tokens, 30)
    assert answer.choices[0].finish_reason == "length"


def test_a_completion_says_what_the_model_says(client: openai.OpenAI, model: Path) -> None:
    from transformers import AutoTokenizer

    answer = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=30)
    assert answer.choices[0].text == generate(
        model, AutoTokenizer.from_pretrained(model)("Once upon a time").input_ids, 30
    )


def test_streams_say_the_same_piece_by_piece(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30)
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert len(chunks) > 10
    assert {chunk.model for chunk in chunks} == {"tiny"}
    text = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=30).choices[0].text
    pieces = list(client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=30, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 30


def test_answers_end_at_the_models_stop_token_and_fill_the_context_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Once upon a time")
    assert answer.usage is not None
    assert answer.usage.total_tokens <= 512
    stopped = client.completions.create(model="tiny", prompt="Once upon a time", stop=[" named", "Lily"], max_tokens=60)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text.endswith("girl")


def test_temperature_is_obeyed(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> str:
        return client.completions.create(model="tiny", prompt="Once", max_tokens=30, **options).choices[0].text

    greedy = ask()
    assert ask(temperature=0) == greedy
    assert len({ask(temperature=1.5) for _ in range(4)}) > 1
    assert ask(temperature=1.5, seed=3) == ask(temperature=1.5, seed=3)


def test_twenty_at_once_streaming_and_not(client: openai.OpenAI) -> None:
    expected = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=40).choices[0].text

    def ask(index: int) -> str:
        asked: Any = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 40}
        if index % 2:
            return "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
        return str(client.completions.create(**asked).choices[0].text)

    started = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    print(f"20 requests at once, 40 tokens each: {time.monotonic() - started:.2f} s")
    assert answers == [expected] * 20


def test_those_who_leave_do_not_keep_the_others_waiting(client: openai.OpenAI, url: str) -> None:
    impatient = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=0.05)

    def leave(_: int) -> None:
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model="tiny", prompt="Once upon a time", max_tokens=500)

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(leave, range(30)))
    started = time.monotonic()
    client.completions.create(model="tiny", prompt="Once", max_tokens=2)
    waited = time.monotonic() - started
    started = time.monotonic()
    client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=500, stop=["no such text"])
    one = time.monotonic() - started
    impatient.close()
    assert waited < 10 * one, "30 abandoned answers were generated to their end"


def test_only_this_model_and_only_these_routes(client: openai.OpenAI, url: str) -> None:
    assert [listed.id for listed in client.models.list()] == ["tiny"]
    for name in ("gpt2", "model", "model@main", str(TINY)):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, prompt="x")
    root = url.removesuffix("/v1")
    for path in ("/load_model", "/reset", "/v1/responses"):
        answer = httpx2.post(root + path, json={"model": str(TINY)}, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 404


def test_refusals_come_as_the_clients_own_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="context is 512 tokens"):
        client.completions.create(model="tiny", prompt="word " * 2000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="unknown_field"):
        client.completions.create(model="tiny", prompt="x", extra_body={"unknown_field": 1})
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="word " * 100_000)
    assert caught.value.status_code == 413
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices, "and it still answers"


# ── the process ───────────────────────────────────────────────────────────────────────────────────────

SERVE = """
import sys
from pathlib import Path
from foretune.errors import ForetuneError
from foretune.serving import serve
try:
    serve(Path(sys.argv[1]), port=0, api_key=sys.stdin.readline().strip(), on_ready=lambda url: print(url, flush=True))
except ForetuneError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


class ServingProcess:
    """`serve` in a process of its own, and all that is below it."""

    def __init__(self, model: Path, temporary: Path) -> None:
        self.temporary = temporary
        environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(KEY + "\n")
        self.process.stdin.flush()
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.process.communicate()[1]
        self.below = psutil.Process(self.process.pid).children(recursive=True)
        assert len(self.below) == 2

    def nothing_is_left(self) -> None:
        wait_for(lambda: not any(is_alive(process) for process in self.below))
        wait_for(lambda: list(self.temporary.iterdir()) == [])

    def end(self) -> None:
        for process in self.below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.communicate()


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[ServingProcess]:
    started = ServingProcess(model, tmp_path)
    yield started
    started.end()


def test_the_key_is_nowhere_below_and_ctrl_c_ends_it_all(server: ServingProcess) -> None:
    for process in server.below:
        assert KEY not in " ".join(process.cmdline())
        assert KEY not in json.dumps(process.environ())
        assert not process.net_connections("inet"), "the engine can be reached through its private socket alone"
    assert httpx2.get(f"{server.url}/models").status_code == 401
    server.process.send_signal(signal.SIGINT)
    _, errors = server.process.communicate(timeout=20)
    assert server.process.returncode == 0, errors
    assert "Traceback" not in errors
    assert KEY not in errors
    server.nothing_is_left()


def test_sigterm_ends_it_while_an_answer_is_under_way(server: ServingProcess) -> None:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        stream = client.completions.create(model="tiny@1: stories", prompt="Once", max_tokens=500, stream=True)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        _, errors = server.process.communicate(timeout=20)
    assert server.process.returncode == 0, errors
    server.nothing_is_left()


def test_a_killed_server_leaves_no_child(server: ServingProcess) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(timeout=5)
    server.nothing_is_left()


def test_a_dead_engine_ends_the_server_with_a_fault(server: ServingProcess) -> None:
    engine = max(server.below, key=lambda process: process.memory_info().rss)
    engine.kill()
    _, errors = server.process.communicate(timeout=20)
    assert server.process.returncode == 4
    assert "the serving engine (transformers) ended with exit status 137" in errors
    assert "Traceback" not in errors
    server.nothing_is_left()


# ── the terminal ──────────────────────────────────────────────────────────────────────────────────────


def talk(model: Path, *lines: str, **options: Any) -> tuple[list[str], str]:
    """Answers (stdout) and talk (stderr) of a conversation."""
    output, aside = io.StringIO(), io.StringIO()
    options = {"input_lines": [line + "\n" for line in lines], "max_new_tokens": 12, **options}
    chat(model, output=output, talk=aside, **options)
    return output.getvalue().splitlines(), aside.getvalue()


def test_chat_answers_one_prompt_as_the_server_does(model: Path, client: openai.OpenAI) -> None:
    served = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12).choices[0].message.content
    answers, aside = talk(model, prompt="Once upon a time")
    assert answers == [served]
    assert "cut at 12 tokens" in aside


def test_chat_remembers_forgets_and_leaves(model: Path) -> None:
    from transformers import AutoTokenizer

    lines = ["Once upon a time", "", "One day", "/reset", "Once upon a time", "/exit", "x"]
    (first, second, after_reset), _ = talk(model, *lines, max_new_tokens=8)
    assert first == after_reset
    messages = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "One day"}]
    tokens = AutoTokenizer.from_pretrained(model).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert second == generate(model, tokens, 8), "the second turn has the first before it"
    assert talk(model, "Once upon a time", system="Lily had a dog.", max_new_tokens=8)[0] != [first]


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(model: Path) -> None:
    answers, aside = talk(model, *["a long story of a cat " * 10] * 8, max_new_tokens=1)
    assert len(answers) == 8
    assert "the oldest turn was forgotten" in aside
    with pytest.raises(UserError, match="the model's context is 512"):
        talk(model, "a long story " * 200)


def test_ctrl_c_stops_the_answer_and_not_the_program(model: Path) -> None:
    class Interrupting(io.StringIO):
        """The user presses Ctrl-C at the third piece of the first answer."""

        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += 1
            if self.pieces == 3:
                raise KeyboardInterrupt
            return super().write(text)

    output, aside = Interrupting(), io.StringIO()
    chat(model, input_lines=["Once upon a time", "Once"], output=output, talk=aside, max_new_tokens=200)
    first, second, *_ = output.getvalue().split("\n")
    assert "(stopped)" in aside.getvalue()
    assert len(first) < 30 < len(second)


def test_chat_reads_a_pipe_and_says_when_there_is_no_template() -> None:
    command = "import sys, pathlib, foretune.serving as s; s.chat(pathlib.Path(sys.argv[1]), max_new_tokens=9)"
    done = subprocess.run(
        [sys.executable, "-c", command, str(TINY)], input="Once upon a time\nOne day\n", text=True, capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert all(done.stdout.splitlines())
    assert "no chat template" in done.stderr
    assert "Traceback" not in done.stderr
