"""Broken and hostile model folders: an error of one line that names the file, never a signal.

Each folder is opened through the Python package and through the command line, in processes of their
own. Folders that are merely unusual must load and answer like the plain one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from make_checkpoint import make_checkpoint

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
DOWN = "model.layers.0.mlp.down_proj.weight"
HIDDEN, VOCAB = 16, 256
SECONDS = 30

# Plans, opens and runs a folder under a limit of memory; an error of the library ends it with 3.
CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import llaisys
try:
    llaisys.models.plan(sys.argv[1], max_seq=32)
except llaisys.LlaisysError as error:
    assert len(str(error).splitlines()) == 1, error
try:
    with llaisys.models.Qwen2(sys.argv[1], max_seq=32, **json.loads(sys.argv[2])) as model:
        print(model.generate([1, 2, 3], 6))
except llaisys.LlaisysError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


def run(*command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT / "bindings")}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=env,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def open_folder(folder: Path, **options: Any) -> subprocess.CompletedProcess:
    return run("-c", CHILD, str(folder), json.dumps(options))


def command_line(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return run(
        "-m",
        "llaisys",
        "generate",
        str(folder),
        "--device",
        "cpu",
        "--prompt",
        "abc",
        "--max-new-tokens",
        "2",
        *options,
    )


def assert_error_line(text: str, *parts: str) -> None:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    for part in parts:
        assert part.lower() in text.lower()


def assert_refused(folder: Path, *parts: str) -> None:
    """Opening fails with one line that has all the parts."""
    done = open_folder(folder)
    assert done.returncode == 3, (done.returncode, done.stdout, done.stderr)
    assert_error_line(done.stderr, *parts)


def assert_command_refused(folder: Path, *parts: str) -> None:
    """So does the command line."""
    done = command_line(folder)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("llaisys: error: ")
    assert_error_line(done.stderr, *parts)
    assert done.stdout == ""


# ---- folders ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A sound folder, with a tokenizer whose 256 tokens are the bytes."""
    folder = tmp_path_factory.mktemp("plain")
    make_checkpoint(
        folder,
        hidden=HIDDEN,
        heads=4,
        kv_heads=2,
        layers=1,
        ffn=24,
        vocab=VOCAB,
        tied=False,
        dtype="f32",
        max_positions=64,
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"})
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy to break."""
    for source in plain.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def answer(plain) -> str:
    """What the plain folder answers."""
    done = open_folder(plain)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def read_weights(folder: Path) -> tuple[dict[str, Any], bytes]:
    image = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(image[:8], "little")
    return json.loads(image[8 : 8 + length]), image[8 + length :]


def write_weights(folder: Path, header: Any, data: bytes) -> None:
    """The header is text or bytes as they are, or what json.dumps can write."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)


# ---- the file as a whole ----


class File(NamedTuple):
    name: str
    make: Callable[[bytes], bytes]  # from the sound file's bytes
    parts: tuple[str, ...] = ()  # of the message, besides the file's name


def with_length(length: int) -> Callable[[bytes], bytes]:
    return lambda image: length.to_bytes(8, "little") + image[8:]


def with_header(header: bytes) -> Callable[[bytes], bytes]:
    return lambda image: len(header).to_bytes(8, "little") + header


FILES = (
    File("empty", lambda image: b""),
    File("7-bytes", lambda image: image[:7]),
    File("8-bytes", lambda image: image[:8]),
    File("cut-header", lambda image: image[:100]),
    File("cut-data", lambda image: image[:-10]),
    File("no-data", lambda image: image[: 8 + int.from_bytes(image[:8], "little")]),
    File("trailing-byte", lambda image: image + b"\0"),
    File("length-0", with_length(0)),
    File("length-1", with_length(1)),
    File("length-one-beyond", lambda image: with_length(len(image) - 7)(image)),
    File("length-2^40", with_length(2**40)),
    File("length-2^63", with_length(2**63)),
    File("length-2^64-1", with_length(2**64 - 1)),
    File("length-2^64-8", with_length(2**64 - 8)),
    File(
        "git-lfs",
        lambda image: (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:"
            + b"0" * 64
            + b"\nsize 3554214752\n"
        ),
        ("lfs",),
    ),
    File("html", lambda image: b"<!DOCTYPE html><html><body>Not Found</body></html>"),
    File("not-utf8", lambda image: image.replace(b'"model.norm', b'"mod\xff\xfe.norm'), ("utf-8",)),
    File(
        "surrogate", with_header(b'{"a\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')
    ),
    File("nested", with_header(b'{"a":' * 10_000 + b"1" + b"}" * 10_000)),
    File("nested-arrays", with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    File("nested-unclosed", with_header(b"[" * 100_000)),
    File("array", with_header(b"[]")),
    File("number", with_header(b"12345678")),
    File("null", with_header(b"null")),
    File("nul-bytes", with_header(b"\0" * 64)),
    File("two-values", with_header(b"{} {}")),
)


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_bad_file(folder, case):
    image = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(case.make(image))
    assert_refused(folder, WEIGHTS, *case.parts)
    assert_command_refused(folder, WEIGHTS, *case.parts)


def test_no_tensors(folder):
    write_weights(folder, {}, b"")
    assert_refused(folder, str(folder), "model.embed_tokens.weight")


def test_header_over_100_mb(folder):
    with (folder / WEIGHTS).open("r+b") as file:  # sparse: it takes no room on disk
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert_refused(folder, WEIGHTS)


# ---- its entries ----


def entry(name: str, **changes: Any) -> Callable[[dict, bytes], tuple[Any, bytes]]:
    """Changes fields of one tensor's entry; None takes the field out."""

    def change(header: dict, data: bytes) -> tuple[Any, bytes]:
        for key, value in changes.items():
            if value is None:
                del header[name][key]
            else:
                header[name][key] = value
        return header, data

    return change


def offsets(begin: Any, end: Any) -> Callable[[dict, bytes], tuple[Any, bytes]]:
    """Replaces the offsets of NORM by JSON text, where "B" and "E" stand for the right ones."""

    def change(header: dict, data: bytes) -> tuple[Any, bytes]:
        right = header[NORM]["data_offsets"]
        begin_text, end_text = (
            str(text).replace("B", str(right[0])).replace("E", str(right[1]))
            for text in (begin, end)
        )
        header[NORM]["data_offsets"] = "here"
        return json.dumps(header).replace('"here"', f"[{begin_text}, {end_text}]"), data

    return change


def replace_entry(value: Any) -> Callable[[dict, bytes], tuple[Any, bytes]]:
    return lambda header, data: (header | {NORM: value}, data)


def extra(shape: list[int]) -> Callable[[dict, bytes], tuple[Any, bytes]]:
    """A tensor of that shape whose entry says that it has no bytes."""
    return lambda header, data: (
        header | {NORM: header[NORM] | {"shape": shape, "data_offsets": [len(data), len(data)]}},
        data,
    )


def overlap(header: dict, data: bytes) -> tuple[Any, bytes]:
    """NORM's entry points to the bytes of BIAS, which has the same size; its own stay uncovered."""
    header[NORM]["data_offsets"] = header[BIAS]["data_offsets"]
    return header, data


def partial_overlap(header: dict, data: bytes) -> tuple[Any, bytes]:
    header[NORM]["data_offsets"] = [offset - 4 for offset in header[NORM]["data_offsets"]]
    return header, data


def shift(header: dict, data: bytes) -> tuple[Any, bytes]:
    """All data starts at 8 instead of 0."""
    for name, value in header.items():
        if name != "__metadata__":
            value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]
    return header, b"\0" * 8 + data


def hole(header: dict, data: bytes) -> tuple[Any, bytes]:
    """Eight bytes before NORM belong to no tensor."""
    begin = header[NORM]["data_offsets"][0]
    for name, value in header.items():
        if name != "__metadata__" and value["data_offsets"][0] >= begin:
            value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]
    return header, data[:begin] + b"\0" * 8 + data[begin:]


def duplicate(header: dict, data: bytes) -> tuple[Any, bytes]:
    text = json.dumps({NORM: header[NORM]})
    return json.dumps(header)[:-1] + ", " + text[1:], data


HALF_COUNT = {"shape": [HIDDEN // 2]}
ENTRIES = {
    "end-before-begin": offsets("E", "B"),
    "negative-offset": offsets("-4", "E"),
    "negative-offsets": offsets("-8", "-4"),
    "fractional-offset": offsets("B.5", "E"),
    "huge-offset": offsets("B", 2**64 + 4),
    "huge-offsets": offsets(2**64, 2**64 + 4 * HIDDEN),
    "offset-2^63": offsets("B", 2**63),
    "offset-1e300": offsets("B", "1e300"),
    "offset-1e999": offsets("B", "1e999"),
    "offset-string": offsets('"B"', "E"),
    "offset-null": offsets("null", "E"),
    "offset-beyond-file": offsets("B", 10**9),
    "three-offsets": entry(NORM, data_offsets=[0, 4, 8]),
    "one-offset": entry(NORM, data_offsets=[0]),
    "no-offsets": entry(NORM, data_offsets=None),
    "offsets-object": entry(NORM, data_offsets={}),
    "no-shape": entry(NORM, shape=None),
    "shape-number": entry(NORM, shape=HIDDEN),
    "shape-negative": entry(NORM, shape=[-HIDDEN]),
    "shape-two-negatives": entry(NORM, shape=[-HIDDEN, -1]),
    "shape-fraction": entry(NORM, shape=[HIDDEN + 0.5]),
    "shape-string": entry(NORM, shape=[str(HIDDEN)]),
    "shape-too-small": entry(NORM, **HALF_COUNT),
    "shape-too-large": entry(NORM, shape=[HIDDEN + 1]),
    "shape-overflow": extra([4194305, 4194305, 211106198978564]),
    "shape-overflow-2^64": extra([2**32, 2**32]),
    "shape-overflow-bytes": extra([2**62]),
    "shape-2^64": extra([2**64]),
    "rank-1000": entry(NORM, shape=[1] * 999 + [HIDDEN]),
    "no-dtype": entry(NORM, dtype=None),
    "dtype-unknown": entry(NORM, dtype="Q7"),
    "dtype-number": entry(NORM, dtype=13),
    "dtype-empty": entry(NORM, dtype=""),
    "dtype-integer": entry(NORM, dtype="I32"),
    "entry-null": replace_entry(None),
    "entry-array": replace_entry([]),
    "entry-string": replace_entry("F32"),
    "overlap": overlap,
    "partial-overlap": partial_overlap,
    "hole": hole,
    "duplicate": duplicate,
    "other-shape": entry(DOWN, shape=[24, HIDDEN]),
    "other-rank": entry(NORM, shape=[1, HIDDEN]),
}
# The name that the message must have, where it is not the tensor's that was changed.
OTHER_TENSORS = {"other-shape": DOWN, "overlap": "model."}


@pytest.mark.parametrize("name", ENTRIES)
def test_bad_entry(folder, name):
    write_weights(folder, *ENTRIES[name](*read_weights(folder)))
    assert_refused(folder, WEIGHTS, OTHER_TENSORS.get(name, NORM))


@pytest.mark.parametrize("name", [NORM, BIAS, "lm_head.weight"])
def test_missing_tensor(folder, name):
    """As if it had another name."""
    header, data = read_weights(folder)
    header = {("model.other" if key == name else key): value for key, value in header.items()}
    write_weights(folder, header, data)
    assert_refused(folder, str(folder), name)


def test_data_does_not_start_at_0(folder):
    write_weights(folder, *shift(*read_weights(folder)))
    assert_refused(folder, WEIGHTS)


def test_metadata_is_no_object(folder):
    header, data = read_weights(folder)
    write_weights(folder, header | {"__metadata__": [1]}, data)
    assert_refused(folder, WEIGHTS, "__metadata__")


def test_100000_entries(folder):
    """All empty, which the format allows; needed ones are missing."""
    header = {
        f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)
    }
    write_weights(folder, header, b"")
    assert_refused(folder, str(folder), "model.embed_tokens.weight")


# ---- shards ----


def shard(folder: Path) -> dict[str, str]:
    """Splits the folder's weights in two files and returns the index's map, not yet written."""
    (folder / WEIGHTS).unlink()
    make_checkpoint(
        folder,
        hidden=HIDDEN,
        heads=4,
        kv_heads=2,
        layers=1,
        ffn=24,
        vocab=VOCAB,
        tied=False,
        dtype="f32",
        max_positions=64,
        shard_size="20KB",
    )
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return read_json(folder / INDEX)["weight_map"]


def test_shards(folder, answer):
    shard(folder)
    assert open_folder(folder).stdout == answer


def test_missing_shard(folder):
    name = shard(folder)[NORM]
    (folder / name).unlink()
    assert_refused(folder, name)


@pytest.mark.parametrize(
    "where",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../x.safetensors",
        "",
        ".",
        "..",
        "sub/",
        "model\0.safetensors",
        "x" * 5000,
    ],
)
def test_shard_outside(folder, where):
    """Even where such a file is there, nothing outside the folder is read."""
    weight_map = shard(folder)
    (folder / "inner").mkdir()
    for file in list(folder.iterdir()):
        if file.is_file() and file.name != INDEX:
            file.rename(folder / "inner" / file.name)
    (folder / "outside.safetensors").write_bytes((folder / "inner" / weight_map[NORM]).read_bytes())
    write_json(folder / "inner" / INDEX, {"weight_map": weight_map | {NORM: where}})
    assert_refused(folder / "inner", INDEX)


def test_index_lies(folder):
    """The shard that the index names does not hold the tensor."""
    weight_map = shard(folder)
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    write_json(folder / INDEX, {"weight_map": weight_map | {NORM: other}})
    assert_refused(folder, NORM)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[" * 100_000,
    ],
)
def test_bad_index(folder, text):
    shard(folder)
    (folder / INDEX).write_text(text)
    assert_refused(folder, INDEX)


# ---- the configuration ----

CONFIGS = {
    "hidden-0": ({"hidden_size": 0}, "hidden_size"),
    "hidden-negative": ({"hidden_size": -16}, "hidden_size"),
    "hidden-fraction": ({"hidden_size": 16.5}, "hidden_size"),
    "hidden-string": ({"hidden_size": "16"}, "hidden_size"),
    "hidden-null": ({"hidden_size": None}, "hidden_size"),
    "hidden-2^64": ({"hidden_size": 2**64}, "hidden_size"),
    "hidden-2^40": ({"hidden_size": 2**40}, ""),
    "hidden-other": ({"hidden_size": 32}, ""),
    "heads-0": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads-not-divisible": ({"num_attention_heads": 3, "head_dim": 4}, "num_key_value_heads"),
    "kv-heads-0": ({"num_key_value_heads": 0}, "num_key_value_heads"),
    "more-kv-heads": ({"num_key_value_heads": 8}, "num_key_value_heads"),
    "odd-head-dim": ({"head_dim": 5}, "head_dim"),
    "layers-0": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "layers-2": ({"num_hidden_layers": 2}, "model.layers.1."),
    "layers-2^31": ({"num_hidden_layers": 2**31}, ""),
    "layers-2^60": ({"num_hidden_layers": 2**60}, "num_hidden_layers"),
    "ffn-0": ({"intermediate_size": 0}, "intermediate_size"),
    "ffn-2^62": ({"intermediate_size": 2**62}, ""),
    "vocab-0": ({"vocab_size": 0}, "vocab_size"),
    "vocab-other": ({"vocab_size": VOCAB + 1}, "model.embed_tokens.weight"),
    "eps-negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    "eps-string": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "theta-0": ({"rope_theta": 0}, "rope_theta"),
    "theta-negative": ({"rope_theta": -10000.0}, "rope_theta"),
    "positions-0": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "eos-string": ({"eos_token_id": "two"}, "eos_token_id"),
    "17-eos-arrays": ({"eos_token_id": [[1]] * 17}, "eos_token_id"),
    "dtype-unknown": ({"torch_dtype": "float8"}, "dtype"),
    # Another model's arithmetic: an answer would be wrong, so there must be none.
    "other-model": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type"),
    "other-activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "rope-scaling": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope"),
    "rope-parameters": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "rope",
    ),
    "sliding-window": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "sliding_window",
    ),
    "sliding-layers": (
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
        "sliding",
    ),
    "linear-layers": ({"layer_types": ["linear_attention"]}, "layer_types"),
    "quantized": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_config(folder, name):
    changes, part = CONFIGS[name]
    write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)
    assert_refused(folder, CONFIG if CONFIGS[name][1] and "." not in part else "", part)


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"],
)
def test_config_lacks_field(folder, key):
    config = read_json(folder / CONFIG)
    del config[key]
    write_json(folder / CONFIG, config)
    assert_refused(folder, CONFIG, key)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"\0\0\0",
        b'{"a":' * 10_000,
        b"[" * 1_000_000,
        b'{"hidden_size": 1e999}',
    ],
)
@pytest.mark.parametrize("name", [CONFIG, "generation_config.json"])
def test_bad_json(folder, name, content):
    if name != CONFIG and content.startswith(b'{"hidden_size'):
        pytest.skip("sound, as generation_config.json")
    (folder / name).write_bytes(content)
    assert_refused(folder, name)


# ---- the folder ----


def test_no_folder(tmp_path):
    assert_refused(tmp_path / "none", "none")
    assert_command_refused(tmp_path / "none", "none")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_lacks_file(folder, name):
    (folder / name).unlink()
    assert_refused(folder, str(folder) if name == WEIGHTS else name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_folder_in_place_of_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_refused(folder, name)


@pytest.mark.parametrize(
    "name", [CONFIG, WEIGHTS, "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_pipe_in_place_of_file(folder, name):
    """Reading it would wait for ever."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_command_refused(folder, name)


def test_weights_instead_of_folder(folder):
    assert_refused(folder / WEIGHTS, WEIGHTS)


def test_unreadable(folder):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / WEIGHTS).chmod(0)
    assert_refused(folder, WEIGHTS)


def test_degree_that_does_not_divide_the_heads(folder):
    done = open_folder(folder, device_ids=[0, 1, 2])
    assert done.returncode == 3, (done.returncode, done.stdout, done.stderr)
    assert_error_line(done.stderr)


# ---- unusual, and sound ----


def permute(header: dict, data: bytes) -> tuple[Any, bytes]:
    """Entries in another order than their data."""
    return dict(reversed(header.items())), data


def add_tensors(header: dict, data: bytes) -> tuple[Any, bytes]:
    """A scalar, an empty tensor and tensors of other types, which the model does not use."""
    for name, dtype, shape, size in (
        ("scalar", "F32", [], 4),
        ("empty", "F32", [0], 0),
        ("empty-2", "BF16", [3, 0, 5], 0),
        ("i64", "I64", [2], 16),
        ("bool", "BOOL", [3], 3),
        ("f8", "F8_E4M3", [5], 5),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [2], 8),
    ):
        begin, data = len(data), data + b"\0" * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    return header, data


SOUND_WEIGHTS = {
    "permuted": permute,
    "more-tensors": add_tensors,
    "leading-space": lambda header, data: (" \n\t" + json.dumps(header), data),
    "trailing-space": lambda header, data: (json.dumps(header) + " " * 1000, data),
    "unaligned": lambda header, data: (json.dumps(header).ljust(8 * 500 + 3), data),
    "escapes": lambda header, data: (
        json.dumps(header).replace("model.norm", "\\u006dodel.n\\u006Frm"),
        data,
    ),
    "metadata": lambda header, data: (header | {"__metadata__": {"a": "\u4f60", "b": ""}}, data),
    "no-metadata": lambda header, data: (
        {name: value for name, value in header.items() if name != "__metadata__"},
        data,
    ),
    "more-fields": entry(NORM, note="hello"),
}


@pytest.mark.parametrize("name", SOUND_WEIGHTS)
def test_unusual_weights(folder, answer, name):
    write_weights(folder, *SOUND_WEIGHTS[name](*read_weights(folder)))
    done = open_folder(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer


SOUND_CONFIGS = {
    "rope-parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "dtype": {"torch_dtype": None, "dtype": "float32"},
    "no-dtype": {"torch_dtype": None},
    "head-dim": {"head_dim": 4},
    "defaults": dict.fromkeys(
        (
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "hidden_act",
            "max_position_embeddings",
            "use_sliding_window",
        )
    ),
    "rope-scaling-default": {"rope_scaling": {"rope_type": "default"}},
    "rope-scaling-null": {"rope_scaling": None},
    "sliding-window-off": {"use_sliding_window": False, "sliding_window": 4096},
    "layer-types": {"layer_types": ["full_attention"]},
    "theta-integer": {"rope_theta": 10000},
    "more-fields": {"something": {"new": [1, 2, {"deep": None}]}, "transformers_version": "9.9"},
}


@pytest.mark.parametrize("name", SOUND_CONFIGS)
def test_unusual_config(folder, answer, name):
    config = read_json(folder / CONFIG) | SOUND_CONFIGS[name]
    keep_null = name == "rope-scaling-null"
    write_json(folder / CONFIG, {k: v for k, v in config.items() if v is not None or keep_null})
    done = open_folder(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer


def test_no_generation_config(folder, answer):
    (folder / "generation_config.json").unlink()
    assert open_folder(folder).stdout == answer


def test_file_of_another_name(folder, answer):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    assert open_folder(folder).stdout == answer
