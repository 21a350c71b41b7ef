"""Clients that people have, unmodified: they need nothing but the address."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("uvicorn")
from server_utils import Served

KEY = "sk-test-1"
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("server") / "log", key=KEY) as served:
        yield served


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="NOT TESTED: the openai package is missing")


@pytest.fixture
def client(openai, server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai(client):
    (model,) = client.models.list().data
    answer = client.chat.completions.create(model=model.id, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    text = client.completions.create(model=model.id, prompt="Hello", max_tokens=3, n=2)
    assert [choice.index for choice in text.choices] == [0, 1]


def test_openai_stream(client):
    options = {"model": "refrain-mini", "messages": QUESTION, "temperature": 0}
    text, usage = "", None
    usage_asked = {"include_usage": True}
    for chunk in client.chat.completions.create(**options, stream=True, stream_options=usage_asked):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == ANSWER
    assert usage.completion_tokens == 12
    with client.chat.completions.stream(**options) as stream:  # accumulates and checks chunks
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**options, extra_body=think).choices[0].message
    assert message.content == ANSWER
    assert message.reasoning_content


def test_openai_errors(openai, client, server):
    options = {"model": "refrain-mini", "messages": QUESTION}
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**options | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="functions: not supported") as raised:
        client.chat.completions.create(**options, functions=[{"name": "f", "parameters": {}}])
    assert raised.value.param == "functions"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_openai_leaves_a_stream(client, server):
    options = {"model": "refrain-mini", "prompt": "Hello", "max_tokens": 900}
    stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    for _ in stream:
        break
    stream.close()
    server.idle(timeout=5)


def test_openai_async(openai, server):
    async def main():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:

            async def ask(number):
                question = [{"role": "user", "content": f"What is {number} + 5?"}]
                options = {"model": "refrain-mini", "messages": question, "temperature": 0}
                parts = await client.chat.completions.create(**options, stream=True)
                return "".join([part.choices[0].delta.content or "" async for part in parts])

            return await asyncio.gather(*map(ask, range(10, 40)))

    answers = asyncio.run(main())
    assert sum(answer == f"{n} + 5 = {n + 5}." for n, answer in enumerate(answers, 10)) > 25
    server.idle()


def test_langchain(server):
    langchain = pytest.importorskip(
        "langchain_openai", reason="NOT TESTED: the langchain-openai package is missing"
    )
    options = {"base_url": server.url + "/v1", "api_key": KEY, "temperature": 0}
    model = langchain.ChatOpenAI(model="refrain-mini", **options)
    assert model.invoke("What is 12 + 30?").content == ANSWER
    assert "".join(part.text for part in model.stream("What is 12 + 30?")) == ANSWER
    assert [a.content for a in model.batch(["What is 12 + 30?"] * 3)] == [ANSWER] * 3


LITELLM = """
import sys
import litellm
options = {"api_base": sys.argv[1], "api_key": sys.argv[2], "temperature": 0}
options["messages"] = [{"role": "user", "content": "What is 12 + 30?"}]
answer = litellm.completion(model="openai/refrain-mini", **options).choices[0].message.content
parts = litellm.completion(model="openai/refrain-mini", stream=True, **options)
print(answer + "|" + "".join(part.choices[0].delta.content or "" for part in parts))
"""


def test_litellm(server):
    """In an environment of its own: it asks for an older openai than the tests above."""
    python = ROOT / ".venv" / "litellm" / "bin" / "python"
    probe = [python, "-c", "import litellm"]
    if not python.exists() or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: litellm is missing; scripts/setup.sh dev installs it")
    done = subprocess.run(
        [python, "-c", LITELLM, server.url + "/v1", KEY],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"{ANSWER}|{ANSWER}\n", done.stderr


NODE = """
const OpenAI = require("openai").default;
(async () => {
  const client = new OpenAI({ baseURL: process.argv[1], apiKey: process.argv[2] });
  const options = { model: "refrain-mini", temperature: 0,
                    messages: [{ role: "user", content: "What is 12 + 30?" }] };
  const answer = await client.chat.completions.create(options);
  let text = "";
  for await (const part of await client.chat.completions.create({ ...options, stream: true }))
    text += part.choices[0]?.delta?.content ?? "";
  console.log(answer.choices[0].message.content + "|" + text);
})();
"""


def test_npm_openai(server, tmp_path):
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("NOT TESTED: node and npm are missing")
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai"]
    installed = subprocess.run(install, check=False, timeout=120, **options)
    if installed.returncode:
        pytest.skip(f"NOT TESTED: npm cannot install openai: {installed.stderr[-300:]}")
    ask = [node, "-e", NODE, server.url + "/v1", KEY]
    done = subprocess.run(ask, check=False, timeout=60, **options)
    assert done.stdout == f"{ANSWER}|{ANSWER}\n", done.stderr


def test_schemathesis(server):
    """Requests made from the server's own description: none may make it fail."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="NOT TESTED: the schemathesis package is missing"
    )
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json", headers=server.headers)
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            response = case.call(headers=server.headers, timeout=60)
            assert response.status_code < 500, response.text
            seen.add((case.operation.path, response.status_code))

        check()
    assert len({path for path, _ in seen}) >= 7
    assert {status for _, status in seen} >= {200, 400}
    server.idle()
