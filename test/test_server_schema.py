"""Answers that follow a schema, from a model so small that only masks can make it: each answer that
ends by itself is valid. And schemas from people who mean harm."""

import concurrent.futures
import enum
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
from llaisys.engine import Engine
from llaisys.server.errors import ApiError
from llaisys.server.grammar import Grammars, Plan
from llaisys.tokenizer import Tokenizer
from pydantic import BaseModel, Field
from server_utils import MINI, Served, chat_body, joined

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OBJECT = {"response_format": {"type": "json_object"}}
SMALL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("server") / "log") as served:
        yield served


def schema_of(schema, strict=True):
    asked = {"name": "x", "schema": schema, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": asked}}


def ask(server, schema, **options):
    """Status and body of a chat under a schema."""
    options = {"temperature": 1, "max_tokens": 900} | options
    status, _, body = server.ask(CHAT, chat_body("Hello", **schema_of(schema), **options))
    return status, body


def check(body, schema):
    """A choice that ends by itself is valid; one that is cut says so."""
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        if choice["finish_reason"] == "stop":
            found = json.loads(choice["message"]["content"])
            jsonschema.Draft202012Validator(schema).validate(found)


# ---- what it does ----


def test_json_object(server):
    ended = 0
    for seed in range(12):
        options = {"temperature": 1.5, "seed": seed, "max_tokens": 300}
        body = server.chat("Hello", **OBJECT, **options)
        (choice,) = body["choices"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
            ended += 1
        events = server.events(CHAT, chat_body("Hello", **OBJECT, **options))
        assert joined(events) == choice["message"]["content"]
        assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert ended > 3


def test_every_way_to_ask(server):
    """n, both endpoints, log-probabilities, stop strings, max_tokens."""
    status, body = ask(server, SMALL, n=8, seed=1)
    assert status == 200
    texts = {choice["message"]["content"] for choice in body["choices"]}
    assert len(texts) == 8
    check(body, SMALL)
    assert all(choice["finish_reason"] == "stop" for choice in body["choices"])
    asked = {"prompt": ["Hello", "Bye"], "max_tokens": 300, **schema_of(SMALL)}
    for choice in server.ask(COMPLETIONS, asked)[2]["choices"]:
        jsonschema.validate(json.loads(choice["text"]), SMALL)

    _, body = ask(server, {"enum": ["left", "right"]}, logprobs=True, top_logprobs=5)
    for entry in body["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] <= 0
        total = sum(2.718281828 ** top["logprob"] for top in entry["top_logprobs"])
        assert total == pytest.approx(1, abs=0.05)  # among what is allowed

    _, body = ask(server, SMALL, stop=['"age"'], seed=4)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop" and "age" not in choice["message"]["content"]
    _, body = ask(server, SMALL, max_tokens=4)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 4
    _, body = ask(server, SMALL, stop=["never"], seed=1)
    assert body["choices"][0]["message"]["content"] in texts  # nothing else has changed
    server.idle()


def test_a_seed_is_a_seed(server):
    """Whatever runs beside it, and however long the masks take to come."""
    alone = [ask(server, SMALL, seed=seed)[1]["choices"][0]["message"] for seed in range(6)]
    plain = server.chat("Tell me a story.", max_tokens=200)["choices"][0]["message"]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = [pool.submit(ask, server, SMALL, seed=seed) for seed in range(6)]
        others = [pool.submit(server.chat, "Tell me a story.", max_tokens=200) for _ in range(6)]
    assert [done.result()[1]["choices"][0]["message"] for done in together] == alone
    for other in others:
        assert other.result()["choices"][0]["message"] == plain


def test_thoughts_are_free(server):
    """The schema holds behind the think block, and so do stop and log-probabilities as ever."""
    options = {"chat_template_kwargs": {"enable_thinking": True}, "temperature": 0}
    free = server.chat("What is 12 + 30?", **options)["choices"][0]["message"]
    _, body = ask(server, SMALL, **options)
    message = body["choices"][0]["message"]
    assert message["reasoning_content"]
    jsonschema.validate(json.loads(message["content"]), SMALL)
    status, _, body = server.ask(CHAT, chat_body("What is 12 + 30?", **schema_of(SMALL), **options))
    assert status == 200
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == free["reasoning_content"]
    jsonschema.validate(json.loads(message["content"]), SMALL)
    events = server.events(CHAT, chat_body("What is 12 + 30?", **schema_of(SMALL), **options))
    assert joined(events) == message["content"]
    assert joined(events, "reasoning_content") == message["reasoning_content"]


def test_disconnects_leave_nothing(server):
    for i in range(30):
        body = chat_body("Hello", **OBJECT, stream=True, temperature=1.5, seed=i, max_tokens=900)
        sock = server.open(CHAT, body)
        if i % 3:
            sock.recv(1000)
        sock.close()
    server.idle()


def test_limits_hold(tmp_path):
    """Few slots and blocks, so that answers wait and give way; time limits; the prefix cache."""
    options = ("--request-timeout", 3, "--max-seqs", 4, "--kv-tokens", 1024)
    with Served(tmp_path / "log", *options) as small:
        long = {"type": "string", "minLength": 10**6}
        status, body = ask(small, long, n=40)
        assert (status, body["error"]["code"]) == (504, "timeout")
        small.idle()
        status, body = ask(small, SMALL, n=16, seed=1, temperature=1.5)
        assert status == 200
        check(body, SMALL)
        assert small.metric("vllm:num_preemptions_total") > 0
        small.idle()
        plain = small.chat("Hello " * 50, max_tokens=1)
        body = small.chat("Hello " * 50, **schema_of(SMALL), max_tokens=400)
        check(body, SMALL)
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert plain["usage"]["prompt_tokens"] - cached <= 32


# ---- schemas of all kinds ----

NAMES = st.sampled_from(["a", "b", "id", "key with space", "ü", 'quo"te'])
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-50, 50), st.integers(0, 1000)).map(
        lambda r: {"type": "integer", "minimum": r[0], "maximum": r[0] + r[1]}
    ),
    st.integers(0, 12).map(lambda n: {"type": "string", "maxLength": n}),
    st.sampled_from(["^[a-c]{1,4}$", "^(yes|no)$", r"^\d{2}-\d{2}$"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
    st.lists(st.sampled_from([1, -2.5, "x", None, True, "ü\n"]), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([0, "hello", {"a": [1]}]).map(lambda value: {"const": value}),
)


def objects(inner):
    def build(properties, wanted):
        required = [name for name in properties if name in wanted]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return st.builds(build, st.dictionaries(NAMES, inner, max_size=4), st.sets(NAMES))


def arrays(inner):
    return st.builds(
        lambda items, least, more: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32), hot=st.booleans())
def test_random_schemas(server, schema, seed, hot):
    status, body = ask(server, schema, seed=seed, temperature=1.5 if hot else 0)
    assert status == 200, body
    check(body, schema)
    # everything in them has an end, and there is room for it
    assert body["choices"][0]["finish_reason"] == "stop" or body["usage"]["total_tokens"] > 800


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    kind: Literal["point"]
    x: Annotated[int, Field(ge=-9, le=9)]


class Circle(BaseModel):
    kind: Literal["circle"]
    centre: Point
    color: Color | None


class Drawing(BaseModel):
    title: Annotated[str, Field(max_length=12)]
    shapes: Annotated[list[Point | Circle], Field(max_length=3)]
    best: Annotated[Point | Circle, Field(discriminator="kind")]


def test_openai_parses_pydantic_models(server):
    openai = pytest.importorskip("openai", reason="NOT TESTED: the openai package is missing")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        options = {
            "model": "refrain-mini",
            "messages": [{"role": "user", "content": "Draw"}],
            "response_format": Drawing,
            "max_tokens": 900,
        }
        for seed in range(5):
            answer = client.chat.completions.parse(**options, seed=seed, temperature=1.2)
            assert isinstance(answer.choices[0].message.parsed, Drawing)
        with client.chat.completions.stream(**options, seed=1) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Drawing)


def test_recursive_schemas(server):
    """A list of lists that ends somewhere, by a reference to itself."""
    node = {
        "type": "object",
        "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 9},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    schema = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    for seed in range(5):
        status, body = ask(server, schema, seed=seed, max_tokens=400)
        assert status == 200
        check(body, schema)


# ---- refusals and hostile schemas ----


def nested(depth):
    text = '{"type":"array","items":' * depth + '{"type":"null"}' + "}" * depth
    asked = '{"type":"json_schema","json_schema":{"name":"x","schema":' + text + "}}"
    return (
        '{"messages":[{"role":"user","content":"x"}],"max_tokens":20,"response_format":'
        + asked
        + "}"
    )


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "sound"}, ["Invalid type: sound"]),
        ({"$ref": "#"}, ["nothing finite"]),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, []),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, ["http://127.0.0.1:1/schema.json"]),
        ({"$ref": "file:///etc/passwd"}, ["file:///etc/passwd"]),
        ({"$schema": "http://evil.example/"}, ["evil.example"]),
        ({"$ref": "#/nowhere"}, ["nowhere"]),
        ({"type": "string", "pattern": "(?=x)y"}, ["look-around"]),
        ({"type": "string", "pattern": r"(.)\1"}, ["backreferences"]),
        ({"type": "string", "pattern": "("}, ["regex"]),
        ({"type": "string", "pattern": "(" * 300 + ")" * 300}, []),
        ({"type": "integer", "multipleOf": 1234567}, ["takes more than", "multipleOf"]),
        ({"type": "integer", "multipleOf": 10**15}, ["too many digits"]),
        ({"allOf": [{"type": "integer", "multipleOf": 9973 + 2 * i} for i in range(9)]}, []),
        ({"enum": []}, ["nsatisfiable"]),
        ({"type": "string", "minLength": 5, "maxLength": 2}, ["minLength"]),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, ["nsatisfiable"]),
        ({"type": "array", "uniqueItems": True}, ["uniqueItems"]),
        ({"not": {}}, ["not"]),
        ({"enum": ["x" * 70_000]}, ["70", "65536"]),
        ({"properties": 5, "type": "object"}, ["properties"]),
        (
            {
                "allOf": [
                    {"anyOf": [{"required": [f"{i}.{j}"], "type": "object"} for i in range(8)]}
                    for j in range(8)
                ]
            },
            ["large"],
        ),
    ],
)  # fmt: skip
def test_refused_schemas(server, schema, words):
    begun = time.monotonic()
    status, body = ask(server, schema)
    assert time.monotonic() - begun < 4
    assert status == 400, body
    error = body["error"]
    assert error["param"] == "response_format.json_schema.schema" or error["param"] == (
        "response_format"
    )
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "^(a|a)*b$"},
        {"type": "string", "pattern": "(a?){1000}a{1000}"},
        {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
        {"type": "string", "pattern": "[a-z]*a[a-z]{60}"},
        {"type": "string", "pattern": r"^(\p{L}{1,500}\d){1,500}$"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"enum": [f"value {i}" for i in range(3000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2000)}},
        {"anyOf": [{"type": "array", "items": {"const": i}} for i in range(1000)]},
        {"type": "object", "patternProperties": {"^(a|b)*$": {"type": "integer"}}},
        {
            "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(100)}
            | {"d100": {"type": "null"}},
            "$ref": "#/$defs/d0",
        },
        {"type": "object", "x-guidance": {"whitespace_pattern": "(a+)+"}},
    ],
)
def test_heavy_schemas(server, schema):
    """Each works, or is refused quickly, and nobody else notices."""
    begun = time.monotonic()
    status, body = ask(server, schema, max_tokens=100, seed=1)
    assert status in (200, 400), body
    assert time.monotonic() - begun < 8
    if status == 400:
        assert body["error"]["code"] == "invalid_schema"
    begun = time.monotonic()
    assert server.ask("/health")[0] == 200
    assert time.monotonic() - begun < 1


def test_what_is_too_ambiguous_on_the_way_says_so(server):
    """Compiles, and cannot be followed: 400, or an error amid a stream; the blocks come back."""
    optional = {f"p{i}": {"type": "null"} for i in range(1200)}
    schema = {"type": "object", "properties": optional}
    status, body = ask(server, schema)
    assert status == 400
    assert "the answer cannot go on" in body["error"]["message"]
    options = {"temperature": 0, "max_tokens": 50, **schema_of(schema)}
    events = server.events(CHAT, chat_body("Hi", **options))
    assert "the answer cannot go on" in events[-1]["error"]["message"]
    server.idle()
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("depth", [5, 60, 150, 1000, 100_000])
def test_deep_schemas(server, depth):
    begun = time.monotonic()
    status, _, body = server.ask(CHAT, nested(depth))
    assert status == (200 if depth < 100 else 400), body
    assert time.monotonic() - begun < 4
    assert server.ask("/health")[0] == 200


def test_a_slow_schema_holds_up_nobody(server):
    """Tokens of a stream keep coming while schemas are compiled that take their whole second."""
    body = {"prompt": "Hello", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
    heavy = [{"type": "integer", "multipleOf": 1000003 + 2 * i} for i in range(3)]
    threads = [threading.Thread(target=ask, args=(server, schema)) for schema in heavy]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        begun = time.monotonic()
        assert server.ask(COMPLETIONS, body | {"max_tokens": 20})[0] == 200
        slowest = max(slowest, time.monotonic() - begun)
    assert slowest < 2
    status, answer = ask(server, SMALL)  # and the next schema finds a process to try it
    assert status == 200
    check(answer, SMALL)


def test_values(server):
    def refused(word, **options):
        status, _, body = server.ask(CHAT, chat_body("Hi", **options))
        assert status == 400, body
        assert word in body["error"]["message"]

    refused("response_format.type", response_format={"type": "yaml"})
    refused("expected one", response_format={"type": "json_schema"})
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": 123}}
    refused("response_format.json_schema.schema", response_format=asked)
    refused("ignore_eos", **OBJECT, ignore_eos=True)
    # not strict: what cannot be kept is left out
    options = schema_of({"type": "array", "uniqueItems": True, "maxItems": 2}, strict=False)
    assert server.ask(CHAT, chat_body("Hi", **options, max_tokens=20))[0] == 200


def test_without_the_library(tmp_path):
    program = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from llaisys.cli import main; sys.exit(main())"
    )
    with Served(tmp_path / "log", program=program) as served:
        status, _, body = served.ask(CHAT, chat_body("Hi", **OBJECT))
        assert status == 400
        assert "llguidance" in body["error"]["message"]
        assert served.chat("What is 12 + 30?")["choices"][0]["message"]["content"]


def test_a_mask_that_allows_nothing_ends_the_request():
    """Without a server: the binding's own way."""
    with Engine(MINI, threads=1, max_seqs=2) as engine:
        events = []

        def sink(event):
            events.append((event.finish, event.message))

        from llaisys.engine import Request, RequestError

        number = engine.submit(Request([1, 2, 3], 5, constrained=True), sink)
        with pytest.raises(RequestError, match="64 for a vocabulary of 2048"):
            engine.set_mask(number, 0, b"\xff" * 8)
        with pytest.raises(RequestError, match="expected 0"):
            engine.set_mask(number, 1, b"\xff" * 256)
        engine.set_mask(number, 0, bytes(256))
        deadline = time.monotonic() + 10
        while not events and time.monotonic() < deadline:
            engine.poll()
        assert events == [(6, b"the mask of the next token allows no token")]


# ---- the cache ----


def test_grammars_are_kept_up_to_a_bound(tmp_path):
    import asyncio

    from llaisys.server import grammar

    async def run():
        grammars = Grammars(Tokenizer(MINI), 2048, [2045, 2043])
        try:
            first = await grammars.compile(Plan('start: "x0"', "p"))
            assert await grammars.compile(Plan('start: "x0"', "p")) is first
            for i in range(grammar.MAX_CACHED + 5):
                await grammars.compile(Plan(f'start: "x{i}"', "p"))
            assert len(grammars._cache) == grammar.MAX_CACHED
            assert await grammars.compile(Plan('start: "x0"', "p")) is not first
            big = await grammars.compile(Plan('start: "big"', "p"))
            big.cost = grammar.MAX_CACHED_BYTES
            await grammars.compile(Plan('start: "after"', "p"))
            assert 'start: "big"' not in grammars._cache
            for _ in range(2):  # failures are known, too
                with pytest.raises(ApiError):
                    await grammars.compile(Plan("start: nowhere", "p"))
            # whatever kills the process that tries grammars, the next one finds another
            grammars._trial.kill()
            await grammars._trial.wait()
            await grammars.compile(Plan('start: "again"', "p"))
            trial = grammars._trial
        finally:
            grammars.close()
        await asyncio.wait_for(trial.wait(), 10)

    asyncio.run(run())


def test_ends_are_the_engines(tmp_path):
    """A model whose end token differs from that of its tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(MINI, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2043}))
    from llaisys.server.prepare import _vocabulary

    assert _vocabulary(folder) == (2048, [2045, 2043])
