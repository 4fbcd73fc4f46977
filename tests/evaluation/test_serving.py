"""scripts/serve.py: answers equal those of generation, mistakes and overload are refused as OpenAI's clients expect."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from chat_tokenizers import CHAT, write_tokenizer
from running import ROOT, script_error

from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import Piece, generate_texts
from lit_eval.model.eval_model import EvalModel, open_model
from lit_eval.serving import app as app_module
from lit_eval.serving import worker as worker_module
from lit_eval.serving.chat import ChatTemplate
from lit_eval.serving.settings import ServerSettings
from lit_model.config import ModelConfig
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.init import initialise
from lit_model.model import GPT
from lit_model.sampling import GREEDY, Sampling

KEY = "a-key"
TINY = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "intermediate_size": 48, "block_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with random weights."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    files = write_tokenizer(out.parent / "tokenizer", "smollm2")
    tokenizer = open_tokenizer(files)
    config = ModelConfig(**{**TINY, "vocab_size": tokenizer.vocab_size})
    model = GPT(config)
    initialise(model, config, 0)
    hf = config_to_hf(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    write_folder(out, hf, tensors_to_hf(config, model.state_dict()))
    shutil.copytree(files, out, dirs_exist_ok=True)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> EvalModel:
    return open_model(folder, device="cpu")


class Client:
    def __init__(self, port: int, key: str | None = None) -> None:
        self.port, self.key = port, key

    def request(self, method: str, path: str, body: bytes | None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        given = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        connection.request(method, path, body, given | {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, content

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, _, content = self.request("POST", f"/v1/{path}", json.dumps(body).encode())
        return status, json.loads(content)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        status, headers, content = self.request("POST", f"/v1/{path}", json.dumps({**body, "stream": True}).encode())
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        events = content.decode().removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def begin(self, **body: Any) -> http.client.HTTPConnection:
        """A request for a completion whose answer nobody reads yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return connection

    def load(self) -> tuple[int, int]:
        found = json.loads(self.request("GET", "/health", None)[2])
        return found["running"], found["waiting"]


@contextmanager
def serving(model: EvalModel, key: str | None = None, **settings: Any) -> Iterator[Client]:
    """The application on a free port, in a thread."""
    limits = ServerSettings(**settings)
    server = app_module.http_server(app_module.build_app(model, "tiny", limits, key), limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Client(listening.getsockname()[1], key)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive()


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_equal_those_of_generation(model: EvalModel) -> None:
    with serving(model) as client:
        for prompt in ("Der König sagte", "", [5, 6, 7]):
            (expected,) = generate_texts(model, [prompt], GenerationSettings(GREEDY, 24))
            status, whole = client.post("completions", prompt=prompt, max_tokens=24, temperature=0)
            assert status == 200 and whole["object"] == "text_completion" and whole["model"] == "tiny"
            assert whole["choices"][0]["text"] == expected.text
            assert whole["choices"][0]["finish_reason"] == ("length" if expected.finish == "length" else "stop")
            usage = {"prompt_tokens": len(expected.prompt_ids), "completion_tokens": len(expected.ids)}
            assert whole["usage"] == {**usage, "total_tokens": sum(usage.values())}
            chunks = client.stream(
                "completions", prompt=prompt, max_tokens=24, temperature=0, stream_options={"include_usage": True}
            )
            assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == expected.text
            assert chunks[-2]["choices"][0]["finish_reason"] is not None and chunks[-1]["usage"] == whole["usage"]
        sampled = GenerationSettings(Sampling(1.2, 0.9, 20, 0.95), 16, seed=3, stop=("a",))
        (expected,) = generate_texts(model, ["Wort"], sampled)
        options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3, "stop": "a"}
        assert (
            client.post("completions", prompt=["Wort"], max_tokens=16, **options)[1]["choices"][0]["text"]
            == expected.text
        )


def test_chat(model: EvalModel, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    (expected,) = generate_texts(model, [list(ids)], GenerationSettings(GREEDY, 8))
    with serving(model) as client:
        status, whole = client.post("chat/completions", messages=CHAT, max_completion_tokens=8, temperature=0)
        assert status == 200 and whole["usage"]["prompt_tokens"] == len(ids)
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
        chunks = client.stream("chat/completions", messages=parts, max_tokens=8, temperature=0)
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected.text
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        assert client.post("chat/completions", messages=image)[0] == 400
        assert client.post("chat/completions", messages=[])[0] == 400


@pytest.mark.parametrize(
    ("status", "message", "body"),
    [
        (400, "n: Input should be less than or equal to 1", {"n": 2}),
        (400, "logprobs: Extra inputs are not permitted", {"logprobs": 5}),
        (400, "temperature: Input should be greater than or equal to 0", {"temperature": -1}),
        (400, "max_tokens: Input should be a valid integer", {"max_tokens": "9"}),
        (400, "max_tokens 100: this server allows at most 64", {"max_tokens": 100}),
        (400, "the prompt's 100 tokens leave room for 28 in the context", {"prompt": [5] * 100, "max_tokens": 29}),
        (400, "the prompt has 128 tokens; the model's context is 128", {"prompt": [5] * 128}),
        (400, "id 99999 is outside the model's vocabulary", {"prompt": [99999]}),
        (400, "the prompt is empty", {"prompt": []}),
        (400, "unpaired surrogate", {"prompt": "\ud800"}),
        (400, "prompt: ", {"prompt": ["a", "b"]}),
        (400, "stop: ", {"stop": [""]}),
        (404, "model 'other' not found; this server has 'tiny'", {"model": "other"}),
    ],
)
def test_bad_requests(client: Client, status: int, message: str, body: dict[str, Any]) -> None:
    got, answer = client.post("completions", **{"prompt": "a", **body})
    assert got == status and message in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_half_a_surrogate_pair_is_no_prompt(model: EvalModel) -> None:
    with pytest.raises(ValueError, match="character 1 is an unpaired surrogate"):
        generate_texts(model, ["a\ud800"], GenerationSettings())


@pytest.fixture(scope="module")
def client(model: EvalModel) -> Iterator[Client]:
    with serving(model, KEY, max_new_tokens=64, max_body_bytes=2000) as one:
        yield one


def test_bodies_keys_and_paths(client: Client) -> None:
    def status(method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        got, _, content = client.request(method, path, body, **headers)
        assert got == 200 or got == 400 or "error" in json.loads(content)
        return got

    good = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert status("POST", "/v1/completions", good) == 200
    assert status("POST", "/v1/completions", good, Authorization="Bearer other") == 401
    assert status("GET", "/v1/models", Authorization="") == 401 and status("GET", "/v1/models") == 200
    assert status("POST", "/v1/completions", b"{") == 400 and status("POST", "/v1/completions", b"\xff") == 400
    assert status("POST", "/v1/completions", b"[" * 1900) == 400
    assert status("POST", "/v1/completions", b" " * 2001) == 413
    assert status("POST", "/v1/completions", b"a", Content_Type="text/plain") == 415
    assert status("GET", "/v1/completions") == 405 and status("GET", "/v1/embeddings") == 404
    assert status("GET", "/v1/models", Host="other.example") == 400
    got, headers, page = client.request("GET", "/", None, Authorization="")
    assert got == 200 and b"<textarea" in page and "script-src 'self'" in headers["content-security-policy"]
    assert not re.search(rb"https?://|<style|<script>|\son\w+=", page)
    assert [client.request("GET", f"/page.{kind}", None)[0] for kind in ("css", "js")] == [200, 200]


def test_chat_templates_render_as_in_transformers(tmp_path: Path) -> None:
    """Also a missing BOS, blocks to train on, and JSON; a template that fails is the client's error, by name."""
    transformers = pytest.importorskip("transformers")
    files = write_tokenizer(tmp_path / "tokenizer", "smollm2", bos_token=None, pad_token=None)

    def ours_and_theirs(template: str) -> tuple[list[int], list[int]]:
        (files / "chat_template.jinja").write_text(template)
        theirs = transformers.AutoTokenizer.from_pretrained(files)
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        return ChatTemplate(open_tokenizer(files)).encode(CHAT), list(ids)

    each = "{% for m in messages %}{{ BODY }}{% endfor %}"
    for template in (
        "{{ bos_token }}{{ pad_token }}[{{ bos_token is defined }}{{ pad_token is defined }}]{{ eos_token }}",
        each.replace("{{ BODY }}", "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"),
        "{% set n = 1 %}{% generation %}{% set n = 2 %}{{ n }}{% endgeneration %}{{ n }}",
        each.replace("BODY", "{'z<': m.content, 'a': 'ä'} | tojson"),
        each.replace("BODY", "m | tojson(ensure_ascii=true, indent=2)"),
        each.replace("BODY", "m | tojson(separators=(',', ':'), sort_keys=true)"),
        each.replace("{{ BODY }}", "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content | upper }}"),
        "{% if tools is none and documents is none and add_generation_prompt %}yes{% endif %}{{ strftime_now('%Y') }}",
    ):
        ours, theirs = ours_and_theirs(template)
        assert ours == theirs and ours, template
    for template, message in (
        ("{{ messages[0].content + 1 }}", "the chat template rejects these messages: can only concatenate str"),
        ("{{ messages | tojson(indent=-1, separators=1) }}", "the chat template rejects these messages: "),
        ("{{ raise_exception('no system role') }}", "the chat template rejects these messages: no system role"),
        ("{% if %}", "the chat template has a syntax error: "),
    ):
        (files / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=re.escape(message)):
            ChatTemplate(open_tokenizer(files)).encode(CHAT)


def test_a_failed_generation(
    model: EvalModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the cause; the client, whether it streams or not, a general text."""

    def broken(*arguments: Any) -> Iterator[Piece]:
        yield Piece("x")
        raise RuntimeError("/a/secret/path")

    monkeypatch.setattr(worker_module, "stream_pieces", broken)
    with serving(model) as client:
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        status, _, content = client.request("POST", "/v1/completions", body)
        last = json.loads(content.decode().split("data: ")[-1])
        assert status == 200 and last["error"]["message"] == "internal server error; the server's log has the cause"
        status, answer = client.post("completions", prompt="a")
        assert status == 500 and answer["error"] == last["error"]
    assert "/a/secret/path" in caplog.text


def test_clients_that_stop_reading_or_sending(model: EvalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not arrive gets 408; a client that no longer reads does not keep the server from ending."""
    monkeypatch.setattr(worker_module, "stream_pieces", lambda *_: iter([Piece("x" * (1 << 21))] * 8))
    monkeypatch.setattr(app_module, "SHUTDOWN_MARGIN_S", 0)
    with serving(model, timeout_s=0.5) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sending:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sending.sendall(head + b"Content-Length: 100\r\n\r\n{")
            answer = b"".join(iter(lambda: sending.recv(4096), b""))  # until the server closes the connection
        assert answer.startswith(b"HTTP/1.1 408") and b"the body did not arrive within 0.5 s" in answer
        reading = client.begin(prompt="a", stream=True)
        until(lambda: client.load() == (0, 0))
        began = time.monotonic()
    assert time.monotonic() - began < 10
    reading.close()


def test_overload_drops_and_timeouts(model: EvalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request runs and one waits; the next is refused before its prompt is tokenized. A client that disconnects
    frees its place; a request that waits too long is refused."""
    gate = threading.Semaphore(0)

    def held(*arguments: Any) -> Iterator[Piece]:
        while gate.acquire(timeout=20):
            yield Piece("x")

    monkeypatch.setattr(worker_module, "stream_pieces", held)
    with serving(model, max_waiting=1, timeout_s=3) as client:
        first = client.begin(prompt="a", stream=True)
        until(lambda: client.load() == (1, 0))
        second = client.begin(prompt="a")
        until(lambda: client.load() == (1, 1))
        with monkeypatch.context() as without_tokenizing:
            without_tokenizing.setattr(app_module, "encode_prompts", None)
            status, headers, content = client.request("POST", "/v1/completions", b'{"prompt": "a"}')
            assert client.post("completions", prompt="a", model="other")[0] == 404
        assert status == 429 and int(headers["retry-after"]) > 0
        assert json.loads(content)["error"]["type"] == "rate_limit_error"
        second.close()
        until(lambda: client.load() == (1, 0))
        first.close()
        time.sleep(0.2)
        gate.release()  # the token being computed
        until(lambda: client.load() == (0, 0))
        status, answer = client.post("completions", prompt="a")
        assert status == 503 and "timed out after 3 s" in answer["error"]["message"]
        gate.release()
        until(lambda: client.load() == (0, 0))


def test_mistakes_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    bad_key = tmp_path / "key"
    bad_key.write_text("two words\n")
    for arguments, message in (
        (("--host", "0.0.0.0"), "which requires an API key: set LLAMMLEIN_API_KEY"),
        (("--api_key_file", bad_key), "printable ASCII characters without spaces"),
        (("--api_key_file", tmp_path / "no"), "no"),
        (("--timeout_s", "0"), "--timeout_s 0.0 must be a positive number of seconds"),
        (("--port", "70000"), "--port 70000 must be at most 65535"),
    ):
        assert message in script_error("serve.py", "--model", folder, *arguments)


@contextmanager
def command(folder: Path, *arguments: str, key: str | None = None) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"LLAMMLEIN_API_KEY": key} if key else {})
    line = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line_of_port = process.stdout.readline()
        port = re.search(r":(\d+) ", line_of_port)
        assert port is not None, line_of_port + (process.stderr.read() if process.stderr is not None else "")
        yield process, Client(int(port[1]), key)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(folder: Path, number: signal.Signals, status: int) -> None:
    """Running requests are finished; Ctrl-C ends with one line."""
    with command(folder) as (process, client), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "completions", prompt="a", max_tokens=100, temperature=0)
        until(lambda: client.load()[0] == 1 or answer.done())
        process.send_signal(number)
        assert answer.result()[0] == 200
        _, errors = process.communicate(timeout=30)
        assert process.returncode == status and "Traceback" not in errors
        assert errors.strip() == ("interrupted" if number == signal.SIGINT else "")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_clients_for_two_minutes(folder: Path, model: EvalModel) -> None:
    """Every answer equals that of generate.py, or is 429 or 503; some clients hang up; memory stays flat."""
    prompts = [f"Wort {i}" for i in range(8)]
    expected = {p: generate_texts(model, [p], GenerationSettings(GREEDY, 20))[0].text for p in prompts}
    with command(folder, "--max_waiting", "12", key=KEY) as (process, client):
        end = time.monotonic() + 120

        def resident() -> int:
            return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])  # type: ignore[index]

        def use(number: int) -> dict[int, int]:
            counts: dict[int, int] = {}
            turn = number
            while time.monotonic() < end:
                turn += 1
                prompt = prompts[turn % len(prompts)]
                if turn % 7 == 0:
                    client.begin(prompt=prompt, max_tokens=100, stream=True).close()
                    continue
                status, answer = client.post("completions", prompt=prompt, max_tokens=20, temperature=0)
                assert status in (200, 429, 503), answer
                assert status != 200 or answer["choices"][0]["text"] == expected[prompt]
                counts[status] = counts.get(status, 0) + 1
                if status == 429:
                    time.sleep(0.05)
            return counts

        for _ in range(100):
            client.post("completions", prompt="a", max_tokens=4)
        before = resident()
        for _ in range(1000):
            assert client.post("completions", prompt="a", max_tokens=4)[0] == 200
        with ThreadPoolExecutor(20) as pool:
            counted = list(pool.map(use, range(20)))
        answered = sum(one.get(200, 0) for one in counted)
        until(lambda: client.load() == (0, 0))
        grown = (resident() - before) / 1024
        print(
            f"\n{answered} answers, {sum(one.get(429, 0) for one in counted)} refused; memory grew by {grown:.1f} MiB"
        )
        assert answered and grown < 30
