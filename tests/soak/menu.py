"""What clients ask for, and what is right about its answer: orders made at random, each with a check of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tests.soak.apis import CHAT, COMPLETIONS, GENERATING, MESSAGES, RESPONSES, Told, check_stream, check_whole
from tests.soak.keys import KEYS, MARK, Key

Check = Callable[[bytes], str]
CheckStream = Callable[[Told], str]

UPSTREAM = "/upstream/"
MIB = 2**20
MAX_BODY = 8 * MIB
FORBIDDEN = ("/sleep?level=2", "/wake_up", "/collective_rpc", "/pause", "/v1/load_lora_adapter", "/server_info")


@dataclass(frozen=True)
class Served:
    """A model as clients know it."""

    name: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Order:
    """One request, without its connection."""

    id: str
    method: str
    target: str
    model: str | None = None
    """Which one it is for; None for what llmuxd answers itself."""
    body: bytes = b""
    content_type: str = "application/json"
    fields: tuple[str, ...] = ()
    """Lines of its head that say who asks, and how urgently."""
    key: Key = KEYS[0]
    stream: bool = False
    code: str = ""
    """Of the error that is its right answer."""
    may_be_gone: bool = False
    """What it asks for may have gone with its engine."""
    check: Check | None = None
    """What is wrong with an answer in one piece."""
    check_stream: CheckStream | None = None

    @property
    def path(self) -> str:
        """The API's."""
        return "/" + self.target.split("/", 3)[3] if self.target.startswith(UPSTREAM) else self.target


class Menu:
    """Orders, as the dice of one client have them, who has this key."""

    def __init__(self, models: tuple[Served, ...], rng: Random, ids: Iterator[str], key: Key = KEYS[0]) -> None:
        self._models = models
        self._rng = rng
        self._ids = ids
        self.key = key

    def _order(self, method: str, target: str, served: Served | None = None, body: bytes = b"", **more: Any) -> Order:
        """One for a model, or for llmuxd itself. What its key forbids is right if it is refused."""
        model = None if served is None else served.name
        if model is not None and not self.key.may_use(model):
            more["code"] = "model_not_allowed"
        if model is not None and method == "POST" and self._rng.random() < 0.1:
            target = f"{UPSTREAM}{model}{target}"
        more.setdefault("fields", self._fields(self.key.secret))
        if "id" not in more:
            more["id"] = next(self._ids)
        return Order(method=method, target=target, model=model, body=body, key=self.key, **more)

    def _fields(self, secret: str) -> tuple[str, ...]:
        as_given = f"x-api-key: {secret}" if self._rng.random() < 0.3 else f"Authorization: Bearer {secret}"
        if self._rng.random() < 0.9:
            return (as_given,)
        return (as_given, f"x-llmux-priority: {self._rng.randint(-100, self.key.priority)}")

    def any(self) -> Order:
        """Whatever a model serves."""
        makers = {
            self.generation: 9,
            self.embeddings: 2,
            self.rerank: 1,
            self.score: 1,
            self.count_tokens: 1,
            self.tokenize: 2,
            self.detokenize: 1,
            self.audio: 2,
        }
        return self._pick(makers)()

    def own(self) -> Order:
        """What llmuxd answers itself."""
        makers = {
            self.list_models: 3,
            self.show_model: 2,
            self.health: 2,
            self.unknown_model: 2,
            self.bad_json: 2,
            self.forbidden: 2,
            self.stranger: 2,
            self.pushy: 1,
        }
        return self._pick(makers)()

    def _pick(self, makers: dict[Callable[[], Order], int]) -> Callable[[], Order]:
        return self._rng.choices(list(makers), list(makers.values()))[0]

    def _model(self) -> tuple[Served, str]:
        served = self._rng.choice(self._models)
        return served, self._rng.choice(served.names)

    # Generation

    def generation(self, stream: bool = False, tokens: int | None = None, filler: int = 0) -> Order:
        """By any of the four APIs. `filler` bytes stand in a field that engines do not look at."""
        served, name = self._model()
        id, count, path = next(self._ids), tokens or self._rng.randint(1, 12), self._rng.choice(GENERATING)
        body: dict[str, Any] = {}
        # The model is found wherever it stands.
        if self._rng.random() < 0.5:
            body["model"] = name
        if filler:
            body["user"] = "A" * filler
        body["model"] = name
        prompt = "say " + "again " * self._rng.randint(1, 5)
        messages = [{"role": "user", "content": prompt}]
        if path == COMPLETIONS:
            body |= {"prompt": prompt, "max_tokens": count}
        elif path == RESPONSES:
            body |= {"input": prompt, "max_output_tokens": count, "metadata": {"id": id}}
        else:
            body |= {"messages": messages, "max_tokens": count}
        if not stream:

            def check(answer: bytes) -> str:
                return check_whole(path, id, served.name, count, answer)

            return self._order("POST", path, served, json.dumps(body).encode(), id=id, check=check)
        body["stream"] = True
        if path in (COMPLETIONS, CHAT):
            body["stream_options"] = {"include_usage": self._rng.random() < 0.5}

        def check_told(told: Told) -> str:
            return check_stream(path, id, served.name, count, told)

        content = json.dumps(body).encode()
        return self._order("POST", path, served, content, id=id, stream=True, check_stream=check_told)

    def large(self) -> Order:
        """A body of up to 8 MiB; small ones are more frequent."""
        size = int(MAX_BODY / 2 ** self._rng.uniform(0.05, 8))
        return self.generation(tokens=3, filler=size)

    def response(self) -> Order:
        """One of the responses API that its engine keeps."""
        served, name = self._model()
        id = next(self._ids)
        body = {"model": name, "input": "x", "max_output_tokens": 2, "metadata": {"id": id}, "store": True}
        content = json.dumps(body).encode()

        def check(answer: bytes) -> str:
            return check_whole(RESPONSES, id, served.name, 2, answer)

        return self._order("POST", RESPONSES, served, content, id=id, check=check)

    def look_up(self, made: Order, answer: bytes) -> Order:
        """What was answered, asked for by its id."""
        (served,) = (one for one in self._models if one.name == made.model)
        response = json.loads(answer)["id"]

        def check(found: bytes) -> str:
            return "" if json.loads(found)["id"] == response else f"another response: {found[:100]!r}"

        return self._order("GET", f"{RESPONSES}/{response}", served, may_be_gone=True, check=check)

    def realtime(self) -> tuple[Order, str]:
        """A WebSocket, and the name that it is asked for."""
        served, name = self._model()
        return self._order("GET", f"/v1/realtime?model={name}", served), served.name

    # The rest of the API

    def embeddings(self) -> Order:
        inputs = ["x" * self._rng.randint(1, 3000) for _ in range(self._rng.randint(1, 8))]
        return self._figures("/v1/embeddings", {"input": inputs}, "embd", "data", len(inputs))

    def rerank(self) -> Order:
        documents = ["y" * self._rng.randint(1, 500) for _ in range(self._rng.randint(1, 5))]
        path = self._rng.choice(("/rerank", "/v1/rerank", "/v2/rerank"))
        return self._figures(path, {"query": "q", "documents": documents}, "score", "results", len(documents))

    def score(self) -> Order:
        texts = ["z" * self._rng.randint(1, 500) for _ in range(self._rng.randint(1, 5))]
        path = self._rng.choice(("/score", "/v1/score"))
        return self._figures(path, {"text_1": "q", "text_2": texts}, "score", "data", len(texts))

    def _figures(self, path: str, body: dict[str, Any], prefix: str, key: str, count: int) -> Order:
        served, name = self._model()
        id = next(self._ids)

        def check(answer: bytes) -> str:
            value = json.loads(answer)
            right = value["id"] == f"{prefix}-{id}" and value["model"] == served.name and len(value[key]) == count
            return "" if right else f"{len(value[key])} figures of {value['model']} for {value['id']}"

        return self._order("POST", path, served, json.dumps({"model": name, **body}).encode(), id=id, check=check)

    def count_tokens(self) -> Order:
        count = self._rng.randint(1, 40)
        messages = [{"role": "user", "content": "word " * count}]

        def check(answer: bytes) -> str:
            found = json.loads(answer)["input_tokens"]
            # Of the messages as JSON, whose own words are counted, too.
            return "" if count < found < count + 6 else f"{found} tokens, not {count} and a few"

        return self._post(f"{MESSAGES}/count_tokens", {"messages": messages}, check)

    def tokenize(self, size: int = 0) -> Order:
        """Its answer has all of the prompt in it, so it is as long as one likes."""
        tag = f"{self._rng.getrandbits(64):016x}"
        prompt = tag * max(1, size // 16)

        def check(answer: bytes) -> str:
            # Read at its ends alone: there may be megabytes of it.
            _, _, numbers = answer.partition(b'"tokens":[')
            numbers, _, _ = numbers.partition(b"]")
            there = numbers[:100].split(b",")[1:-1] + numbers[-100:].split(b",")[1:-1]
            right = {str(byte).encode() for byte in tag.encode()}.issuperset(there)
            same = right and numbers.count(b",") == len(prompt) - 1
            return "" if same else f"the tokens of another text: {answer[:100]!r}"

        return self._post("/tokenize", {"prompt": prompt}, check)

    def detokenize(self) -> Order:
        text = f"{self._rng.getrandbits(64):016x}"

        def check(answer: bytes) -> str:
            found = json.loads(answer)["prompt"]
            return "" if found == text else f"another text: {found[:40]}"

        return self._post("/detokenize", {"tokens": list(text.encode())}, check)

    def _post(self, path: str, body: dict[str, Any], check: Check) -> Order:
        served, name = self._model()
        content = json.dumps({"model": name, **body}).encode()
        return self._order("POST", path, served, content, check=check)

    def audio(self) -> Order:
        """Multipart, with the model before or after the file."""
        served, name = self._model()
        size = self._rng.randint(1, 200_000)
        boundary = f"{self._rng.getrandbits(64):016x}"
        model = f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{name}\r\n'.encode()
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        file = head.encode() + b"Content-Type: audio/wav\r\n\r\n" + self._rng.randbytes(size) + b"\r\n"
        parts = [model, file] if self._rng.random() < 0.5 else [file, model]

        def check(answer: bytes) -> str:
            found = json.loads(answer)["bytes"]
            return "" if found == size else f"the text of a file of {found} bytes, not {size}"

        path = self._rng.choice(("/v1/audio/transcriptions", "/v1/audio/translations"))
        form = f"multipart/form-data; boundary={boundary}"
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        return self._order("POST", path, served, body, content_type=form, check=check)

    # What no engine sees

    def list_models(self) -> Order:
        usable = [served for served in self._models if self.key.may_use(served.name)]
        names = sorted(name for served in usable for name in served.names)

        def check(answer: bytes) -> str:
            found = sorted(card["id"] for card in json.loads(answer)["data"])
            return "" if found == names else f"the models are {found}"

        return self._order("GET", "/v1/models", check=check)

    def show_model(self) -> Order:
        served, name = self._model()

        def check(answer: bytes) -> str:
            found = json.loads(answer)["id"]
            return "" if found == name else f"the model is {found}"

        code = "" if self.key.may_use(served.name) else "model_not_found"
        return self._order("GET", f"/v1/models/{name}", code=code, check=check)

    def health(self) -> Order:
        """Without a key. Clients only see that it answers; whether all should be well is looked at elsewhere."""
        return self._order("GET", "/health", fields=())

    def unknown_model(self) -> Order:
        body = json.dumps({"model": f"no-{self._rng.getrandbits(32)}", "prompt": "x"}).encode()
        return self._order("POST", COMPLETIONS, body=body, code="model_not_found")

    def bad_json(self) -> Order:
        body = self._rng.choice((b'{"model": "', b"{", b'{"model": "a",}', b"\xff\xfe", b"[1, 2"))
        return self._order("POST", self._rng.choice(GENERATING), body=body, code="invalid_json")

    def forbidden(self) -> Order:
        """A development endpoint, or one of the operator's."""
        return self._order("POST", self._rng.choice(FORBIDDEN), body=b"{}", code="unknown_url")

    def stranger(self) -> Order:
        """Somebody without a key, or with one that is none."""
        fields = self._rng.choice(((), self._fields(f"{MARK}{self._rng.getrandbits(32)}")))
        order = self._rng.choice((self.generation, self.list_models))()
        return replace(order, model=None, fields=fields, code="invalid_api_key")

    def pushy(self) -> Order:
        """More urgent than its key allows."""
        fields = (f"x-api-key: {self.key.secret}", f"x-llmux-priority: {self._rng.randint(self.key.priority + 1, 100)}")
        return replace(self.generation(), model=None, fields=fields, code="priority_not_allowed")
