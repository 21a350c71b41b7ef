"""Tools: calls that follow their schemas, whole and as streams, there and back again."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
from llaisys.server.grammar import LIMITS
from llaisys.server.plans import make_plan
from llaisys.server.schema import ChatRequest
from llaisys.server.tools import CallParser, describe, is_native, merge
from llaisys.server.trial import make_tokenizer
from llaisys.tokenizer import Tokenizer
from server_utils import MINI, Served, chat_body, joined

CHAT = "/v1/chat/completions"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
BY_NAME = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("server") / "log") as served:
        yield served


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A model with a template and tokens for tools, as Qwen's have them."""
    folder = tmp_path_factory.mktemp("native") / "refrain-mini"
    shutil.copytree(MINI, folder)
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    text = text.replace('"</think>"', '"</tool_call>"').replace('"<think>"', '"<tool_call>"')
    file.write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>"
        "{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
        "{% endfor %}<|im_end|>\n{% endfor %}assistant: "
    )
    with Served(folder.parent / "log", model=folder) as served:
        yield served


def asked(choice, tools=(ADD, NOW), **options):
    options = {"temperature": 1, "max_tokens": 400} | options
    return chat_body("What is 12 + 30?", tools=list(tools), tool_choice=choice, **options)


def streamed_calls(events):
    """The calls of a stream's first choice, put together as clients do."""
    deltas = []
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == 0:
                deltas += choice["delta"].get("tool_calls", [])
    assert [d["index"] for d in deltas] == sorted(d["index"] for d in deltas)
    return merge(deltas)


def check_call(call):
    assert call["type"] == "function" and call["id"].startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "now":
        assert arguments == {}
    else:
        assert call["function"]["name"] == "add"
        assert set(arguments) == {"a", "b"}
        assert all(type(n) is int and 0 <= n < 100 for n in arguments.values())


def test_demanded_calls(server):
    names = set()
    for seed in range(12):
        body = asked("required", seed=seed, temperature=2, parallel_tool_calls=False)
        status, _, answer = server.ask(CHAT, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        check_call(call)
        names.add(call["function"]["name"])
        events = server.events(CHAT, body)
        (other,) = streamed_calls(events)
        assert other["function"] == call["function"] and other["id"] != call["id"]
        assert joined(events) == ""
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        first = next(e for e in events if e["choices"][0]["delta"].get("tool_calls"))
        assert first["choices"][0]["delta"]["tool_calls"][0]["function"]["name"]
    assert names == {"add", "now"}
    server.idle()


def test_a_named_call(server):
    for seed in range(4):
        (choice,) = server.ask(CHAT, asked(BY_NAME, seed=seed))[2]["choices"]
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] == "add"
            check_call(call)
        # OpenAI's word where the call was demanded by name
        assert choice["finish_reason"] == "stop"


def test_several_calls_and_choices(server):
    counts = set()
    unwilling = {"logit_bias": {"2043": -3, "2045": -3}}  # to end
    options = {"n": 12, "seed": 3, "temperature": 2, "max_tokens": 600} | unwilling
    body = server.ask(CHAT, asked("required", **options))[2]
    for choice in body["choices"]:
        calls = choice["message"]["tool_calls"]
        counts.add(len(calls))
        assert len({call["id"] for call in calls}) == len(calls)
        for call in calls if choice["finish_reason"] == "tool_calls" else calls[:-1]:
            check_call(call)
    assert max(counts) > 1


def test_thoughts_and_formats_beside_tools(server):
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "temperature": 0}
    body = asked("required", parallel_tool_calls=False, **thinking)
    (choice,) = server.ask(CHAT, body)[2]["choices"]
    assert choice["message"]["reasoning_content"]
    check_call(choice["message"]["tool_calls"][0])
    events = server.events(CHAT, body)
    assert joined(events, "reasoning_content") == choice["message"]["reasoning_content"]
    assert streamed_calls(events)[0]["function"] == choice["message"]["tool_calls"][0]["function"]
    (choice,) = server.ask(CHAT, asked("auto", **thinking))[2]["choices"]
    assert choice["message"]["reasoning_content"] and choice["message"]["content"]

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(10):
        body = asked("auto", seed=seed, temperature=2, response_format=wanted)
        (choice,) = server.ask(CHAT, body)[2]["choices"]
        message = choice["message"]
        kinds.add("tool_calls" in message)
        if choice["finish_reason"] == "stop":
            assert list(json.loads(message["content"])) == ["a"]
        elif choice["finish_reason"] == "tool_calls":
            check_call(message["tool_calls"][0])
    assert False in kinds


def test_a_call_that_is_cut_says_so(server):
    (choice,) = server.ask(CHAT, asked(BY_NAME, max_tokens=25))[2]["choices"]
    assert choice["finish_reason"] == "length"


def test_none_and_auto(server):
    answers = [
        server.ask(CHAT, asked(choice, temperature=0))[2]["choices"][0]
        for choice in ("none", "auto")
    ]
    for choice in answers:
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"]
    # with none, the model is not told of them
    plain = server.chat("What is 12 + 30?")["choices"][0]["message"]
    assert answers[0]["message"] == plain


def test_auto_with_a_token_of_its_own(native):
    """Free up to the tag, which is forced here; then a valid call; then free again, or the end."""
    force = {"logit_bias": {"2046": 100}, "max_tokens": 200}
    for seed in range(4):
        body = asked("auto", seed=seed, parallel_tool_calls=False, **force)
        (choice,) = native.ask(CHAT, body)[2]["choices"]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        check_call(call)
        (other,) = streamed_calls(native.events(CHAT, body))
        assert other["function"] == call["function"]
        body = asked("auto", seed=seed, **force)  # the tag comes again and again
        (choice,) = native.ask(CHAT, body)[2]["choices"]
        assert choice["finish_reason"] == "length"
        assert len(choice["message"]["tool_calls"]) > 2
        for call in choice["message"]["tool_calls"][:-1]:
            check_call(call)
    (choice,) = native.ask(CHAT, asked("required", seed=1, parallel_tool_calls=False))[2]["choices"]
    check_call(choice["message"]["tool_calls"][0])
    native.idle()


def test_there_and_back(server, native):
    """A client answers a call and asks on."""
    openai = pytest.importorskip("openai", reason="NOT TESTED: the openai package is missing")
    for served in (server, native):
        with openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client:
            messages = [{"role": "user", "content": "What is 12 + 30?"}]
            options = {"model": "refrain-mini", "tools": [ADD], "max_tokens": 300}
            answer = client.chat.completions.create(
                messages=messages, tool_choice="required", parallel_tool_calls=False, **options
            )
            message = answer.choices[0].message
            (call,) = message.tool_calls
            numbers = json.loads(call.function.arguments)
            messages.append(message)
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": call.id,
                    "content": str(numbers["a"] + numbers["b"]),
                }
            )
            answer = client.chat.completions.create(messages=messages, temperature=0, **options)
            assert answer.choices[0].finish_reason in ("stop", "length")
            assert answer.usage.prompt_tokens > 20
            asked_again = client.chat.completions.create(
                messages=messages, tool_choice="none", **options
            )
            assert asked_again.choices[0].message.content is not None


def test_openai_parses_arguments(server):
    """By its own helpers, whole and streamed: they check every piece."""
    openai = pytest.importorskip("openai", reason="NOT TESTED: the openai package is missing")
    from pydantic import BaseModel, Field

    class Add(BaseModel):
        a: int = Field(ge=0, le=99)
        b: int = Field(ge=0, le=99)

    options = {
        "model": "refrain-mini",
        "messages": [{"role": "user", "content": "What is 12 + 30?"}],
        "tools": [openai.pydantic_function_tool(Add)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "seed": 1,
    }
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.parse(**options)
        (call,) = answer.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Add)
        with client.chat.completions.stream(**options) as stream:
            kinds = {event.type for event in stream}
            (other,) = stream.get_final_completion().choices[0].message.tool_calls
        assert other.function.parsed_arguments == call.function.parsed_arguments
        assert "tool_calls.function.arguments.done" in kinds


def test_langchain_binds_tools(server):
    langchain = pytest.importorskip("langchain_openai", reason="NOT TESTED: langchain-openai")
    from pydantic import BaseModel, Field

    class Add(BaseModel):
        """Adds two numbers."""

        a: int = Field(ge=0, le=99)
        b: int = Field(ge=0, le=99)

    model = langchain.ChatOpenAI(
        base_url=server.url + "/v1", api_key="x", model="refrain-mini", max_tokens=300, seed=1
    )
    # strict: else a model this small makes up arguments of its own, which the schema allows
    options = {"tool_choice": "any", "strict": True, "parallel_tool_calls": False}
    message = model.bind_tools([Add], **options).invoke("12 + 30?")
    (call,) = message.tool_calls
    assert call["name"] == "Add" and set(call["args"]) == {"a", "b"}
    for method in ("function_calling", "json_schema"):
        found = model.with_structured_output(Add, method=method, strict=True).invoke("12 + 30?")
        assert isinstance(found, Add)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": 'x"'}}]}, "name"),
        ({"tools": [NOW, NOW]}, "differ"),
        ({"tools": [NOW] * 200}, "tools"),
        ({"tools": [NOW], "tool_choice": BY_NAME}, "no tool"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tool_choice": "required", "tools": []}, "no tools"),
        ({"tool_choice": "sometimes", "tools": [NOW]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [NOW]}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "parameters",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {"type": "array", "uniqueItems": True},
                        },
                    }
                ]
            },
            "uniqueItems",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    },
                ]
            },
            "arguments",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
    ],
)
def test_refused(server, options, words):
    status, _, body = server.ask(CHAT, chat_body("Hi", **options))
    assert status == 400, body
    assert words in body["error"]["message"] or words in (body["error"]["param"] or "")


# ---- the prompt ----


def test_what_a_template_without_tools_is_told():
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {"role": "tool", "content": "2", "tool_call_id": "d"},
    ]
    system, user, assistant, results = describe(messages, [ADD])
    assert system["role"] == "system" and json.dumps(ADD) in system["content"]
    assert user == {"role": "user", "content": "Q"}
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert assistant == {"role": "assistant", "content": f"{text}\n{text}"}
    assert results["role"] == "user"
    assert results["content"] == (
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )
    first = describe([{"role": "system", "content": "S"}, messages[0]], [NOW])[0]
    assert first["content"].startswith("S\n\n# Tools")
    assert describe(messages[:1], []) == messages[:1]
    assert is_native("{% if tools %}<tool_call>{% endif %}")
    assert not is_native("{{ messages }}") and not is_native("<tool_call> mytools")


# ---- the parser ----

TEXTS = {
    "Just text.": ("Just text.", []),
    "  x  \n": ("  x  \n", []),
    '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{</tool_call>"}}\n</tool_call>': (
        "",
        [("f", '{"a": "}\\"{</tool_call>"}')],
    ),
    'Wait. \n<tool_call>{"name":"f","arguments":{}}</tool_call> \n<tool_call>\n'
    '{"name": "g", "parameters": {"x": [1, {"y": 2}]}}</tool_call>\n': (
        "Wait.",
        [("f", "{}"), ("g", '{"x": [1, {"y": 2}]}')],
    ),
    '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>': ("", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f"}': ("", [("f", "{}")]),
    "<tool_call>what?</tool_call>": ("<tool_call>what?</tool_call>", []),
    "<tool_call>[1]</tool_call>": ("<tool_call>[1]</tool_call>", []),
    "a <tool_cal": ("a <tool_cal", []),
    '<tool_call>{"name": "f", "arguments": {"a": 1': ("", [("f", '{"a": 1')]),
    '<tool_call>{"na': ('<tool_call>{"na', []),
}


@given(text=st.sampled_from(list(TEXTS)), cuts=st.lists(st.integers(0, 150)))
def test_calls_are_found_however_the_text_is_cut(text, cuts):
    parser, content, deltas = CallParser(), "", []
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(edges):
        more, found = parser.push(text[begin:end])
        content += more
        deltas += found
    more, found = parser.finish()
    content += more
    deltas += found
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in merge(deltas)]
    assert (content, calls) == TEXTS[text]


@pytest.mark.parametrize("is_parallel", [False, True])
def test_auto_without_a_token_of_its_own(is_parallel):
    """The tag is spelled, which a model this small never does: the grammar by itself."""
    llguidance = pytest.importorskip("llguidance")
    request = ChatRequest.model_validate(asked("auto", parallel_tool_calls=is_parallel))
    tokenizer = Tokenizer(MINI)
    plan = make_plan(request, tokenizer, thinks=False)
    assert plan.after is None
    table = make_tokenizer(tokenizer.to_json(), 2048, [2045, 2043])

    def follow(text):
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(table, plan.grammar, log_level=0, limits=limits)
        is_right = matcher.consume_tokens(tokenizer.encode(text, add_special_tokens=False))
        return is_right and matcher.is_accepting()

    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert follow("Just text, with < and {.\n")
    assert follow(f"Well: {call}")
    assert follow(f"{call}\n{call}") == is_parallel
    assert not follow(call.replace('"b"', '"c"'))
    assert not follow(call.replace("add", "sub"))
