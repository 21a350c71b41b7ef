"""Seeded generator of short chat dialogues: what refrain-mini learns, and what it is tested on.

    from dialogues import generate
    for messages in itertools.islice(generate(seed=0, split="train"), 3):
        print(messages)

A dialogue is a list of {"role", "content"} messages; assistant messages carry a "topic" as well,
and the last one of some dialogues a "reasoning". Each question has exactly one right answer.

Splits. Every question has a key, and a hash of the key alone says to which split it belongs, so no
question of the `heldout` split is ever asked in training:
    add         the unordered pair of operands: held-out pairs occur in no phrasing, in no language
    subtract    the pair of operands
    count       the pair of ends
    remember    the value: in training nobody ever has a held-out name, number or city; of the few
                colours and foods, the value together with the wording that tells it
    repeat      the words to repeat
    the model, the engine, pleasantries
                the whole wording, with its opening and closing phrases
    others      the phrasing together with the entity (day, country, word, product ...), as what is
                known by heart cannot be inferred
"""

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import dialogue_facts as facts

Message = dict[str, str]
SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 10
MARKS = "?.!？。！ "


class Turn(NamedTuple):
    """One question with its only right answer, and a thought that leads to it."""

    topic: str
    question: str
    answer: str
    thought: str


class Memory(NamedTuple):
    """A fact that the user tells in one turn and asks for in a later one."""

    tell: Turn
    recall: Turn


@cache
def _in_heldout(key: str) -> bool:
    """Whether the split of this key is `heldout`."""
    digest = hashlib.blake2b(("refrain/" + key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELDOUT_ONE_IN == 0


@cache
def _pool(kind: str, lang: str, heldout: bool) -> tuple:
    """The entries of a finite set of questions that belong to the split, in a fixed order."""
    make = {
        "day": _day_entries,
        "month": _month_entries,
        "colour": _colour_entries,
        "capital": _capital_entries,
        "spell": _spell_entries,
        "self": _intent_entries,
        "engine": _intent_entries,
        "smalltalk": _smalltalk_entries,
    }
    entries = make[kind](kind, lang)
    return tuple(entry for key, entry in entries if _in_heldout(key) == heldout)


def _draw(heldout: bool, sample: Callable[[], tuple], key: Callable[..., str]) -> tuple:
    """Sample until the key of what came lies in the wanted split."""
    while True:
        value = sample()
        if _in_heldout(key(*value)) == heldout:
            return value


def _ends(rng: random.Random, lang: str) -> tuple[str, str]:
    """An opening and a closing phrase to put around a question; usually both empty."""
    en = lang == "en"
    opener = rng.choice(facts.OPENERS if en else facts.OPENERS_ZH) if rng.random() < 0.2 else ""
    closer = rng.choice(facts.CLOSERS if en else facts.CLOSERS_ZH) if rng.random() < 0.06 else ""
    return opener, closer


def _bare(text: str) -> str:
    """What `_style` leaves of every spelling of a question."""
    return text.lower().rstrip(MARKS)


def _style(rng: random.Random, question: str, lang: str, keep_case: bool = False) -> str:
    """Now and then write as people type: without the final mark, or all in lower case."""
    roll = rng.random()
    if roll < 0.15:
        question = question.rstrip(MARKS)
    if roll < 0.08 and lang == "en" and not keep_case:
        question = question.lower()
    return question


# Questions about the model, about the engine, and pleasantries: one answer for each intent.


def _intents(kind: str, lang: str) -> Sequence[facts.Intent]:
    return {
        ("self", "en"): facts.SELF_EN,
        ("self", "zh"): facts.SELF_ZH,
        ("engine", "en"): facts.ENGINE_EN,
        ("engine", "zh"): facts.ENGINE_ZH,
        ("smalltalk", "en"): facts.SMALLTALK_EN,
        ("smalltalk", "zh"): facts.SMALLTALK_ZH,
    }[kind, lang]


def _intent_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    zh = lang == "zh"
    openers = ("",) * 2 + (facts.OPENERS_ZH if zh else facts.OPENERS)
    closers = ("",) * 3 + (facts.CLOSERS_ZH if zh else facts.CLOSERS)
    for intent in _intents(kind, lang):
        for opener, question, closer in itertools.product(openers, intent.questions, closers):
            wording = opener + question + closer
            yield f"{kind}|{_bare(wording)}", Turn(kind, wording, intent.answer, intent.thought)


def _smalltalk_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    hails = ("", "") + (facts.HAILS if lang == "en" else facts.HAILS_ZH)
    marks = (".", "!", "") if lang == "en" else ("。", "！", "")
    for intent in _intents(kind, lang):
        for question, hail, mark in itertools.product(intent.questions, hails, marks):
            if intent.name == "how":
                mark = "?"
            wording = question + hail + mark
            yield f"{kind}|{_bare(wording)}", Turn(kind, wording, intent.answer, intent.thought)


def _chat(kind: str) -> Callable[[random.Random, bool, str], Turn]:
    def make(rng: random.Random, heldout: bool, lang: str) -> Turn:
        turn = rng.choice(_pool(kind, lang, heldout))
        return turn._replace(question=_style(rng, turn.question, lang))

    return make


# Phrasing times entity: days, months, colours, capitals, spelling.


def _calendar_entries(
    kind: str, asks: Sequence[tuple[str, int]], names: Sequence[str], thought: str
) -> Iterator[tuple[str, Turn]]:
    for (ask, offset), (index, name) in itertools.product(asks, enumerate(names)):
        answer = names[(index + offset) % len(names)]
        low, high = sorted((0, offset))
        row = ", ".join(names[(index + i) % len(names)] for i in range(low, high + 1))
        mark = "." if names[0].isascii() else "。"
        yield (
            f"{kind}|{ask}|{name}",
            Turn(kind, ask.format(x=name), answer + mark, thought.format(row)),
        )


def _day_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    if lang == "en":
        return _calendar_entries(kind, facts.DAY_ASKS, facts.DAYS, "The days go {}.")
    return _calendar_entries(kind, facts.DAY_ASKS_ZH, facts.DAYS_ZH, "顺序是{}。")


def _month_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    if lang == "en":
        return _calendar_entries(kind, facts.MONTH_ASKS, facts.MONTHS, "The months go {}.")
    return _calendar_entries(kind, facts.MONTH_ASKS_ZH, facts.MONTHS_ZH, "顺序是{}。")


def _colour_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    if lang == "en":
        for ask, (thing, colour) in itertools.product(facts.COLOUR_ASKS, facts.THINGS.items()):
            answer = f"{thing[0].upper()}{thing[1:]} is {colour}."
            thought = f"I think of {thing}."
            yield f"{kind}|{ask}|{thing}", Turn(kind, ask.format(x=thing), answer, thought)
        return
    for ask, (thing, colour) in itertools.product(facts.COLOUR_ASKS_ZH, facts.THINGS_ZH.items()):
        answer, thought = f"{thing}是{colour}。", f"我想到{thing}。"
        yield f"{kind}|{ask}|{thing}", Turn(kind, ask.format(x=thing), answer, thought)


def _capital_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    if lang == "en":
        for ask, (land, city) in itertools.product(facts.CAPITAL_ASKS, facts.CAPITALS.items()):
            answer = f"The capital of {land} is {city}."
            thought = f"The country is {land}."
            yield f"{kind}|{ask}|{land}", Turn(kind, ask.format(x=land), answer, thought)
        return
    for ask, (land, city) in itertools.product(facts.CAPITAL_ASKS_ZH, facts.CAPITALS_ZH.items()):
        answer, thought = f"{land}的首都是{city}。", f"国家是{land}。"
        yield f"{kind}|{ask}|{land}", Turn(kind, ask.format(x=land), answer, thought)


def _spell_entries(kind: str, lang: str) -> Iterator[tuple[str, Turn]]:
    for ask, word in itertools.product(facts.SPELL_ASKS, facts.WORDS):
        answer = "-".join(word)
        thought = f"The word {word} has {len(word)} letters."
        yield f"{kind}|{ask}|{word}", Turn(kind, ask.format(x=word), answer, thought)


def _known(kind: str) -> Callable[[random.Random, bool, str], Turn]:
    def make(rng: random.Random, heldout: bool, lang: str) -> Turn:
        turn = rng.choice(_pool(kind, lang, heldout))
        opener, closer = _ends(rng, lang)
        return turn._replace(question=_style(rng, opener + turn.question + closer, lang))

    return make


# Arithmetic and counting.


def _sum_thought(a: int, b: int, lang: str) -> str:
    ones, carry = a % 10 + b % 10, int(a % 10 + b % 10 > 9)
    tens = f"{a // 10} + {b // 10} + {carry} = {a // 10 + b // 10 + carry}"
    if lang == "en":
        return f"Ones: {a % 10} + {b % 10} = {ones}, carry {carry}. Tens: {tens}."
    return f"个位：{a % 10} + {b % 10} = {ones}，进{carry}。十位：{tens}。"


def _difference_thought(a: int, b: int, lang: str) -> str:
    borrow = int(a % 10 < b % 10)
    ones = f"{a % 10 + 10 * borrow} - {b % 10} = {(a - b) % 10}"
    tens = f"{a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}"
    if lang == "en":
        return f"Borrow {borrow}. Ones: {ones}. Tens: {tens}."
    return f"借{borrow}。个位：{ones}。十位：{tens}。"


def _product_thought(a: int, b: int, lang: str) -> str:
    row = ", ".join(str(a * i) for i in range(1, b + 1)) or "0"
    return f"Count by {a}, {b} times: {row}." if lang == "en" else f"每次加{a}，共{b}次：{row}。"


def _operand(rng: random.Random) -> int:
    return rng.randrange(50) if rng.random() < 0.7 else rng.randrange(12)


def _arithmetic(rng: random.Random, heldout: bool, lang: str) -> Turn:
    zh, roll = lang == "zh", rng.random()
    if roll < 0.4:
        a, b = _draw(
            heldout, lambda: (_operand(rng), _operand(rng)), lambda a, b: f"{min(a, b)}+{max(a, b)}"
        )
        asks, line = facts.ADD_ASKS_ZH if zh else facts.ADD_ASKS, f"{a} + {b} = {a + b}"
        thought = _sum_thought(a, b, lang)
    elif roll < 0.8:
        a, b = _draw(
            heldout,
            lambda: tuple(sorted((_operand(rng), _operand(rng)), reverse=True)),
            lambda a, b: f"{a}-{b}",
        )
        asks, line = facts.SUB_ASKS_ZH if zh else facts.SUB_ASKS, f"{a} - {b} = {a - b}"
        thought = _difference_thought(a, b, lang)
    else:
        mul_asks = facts.MUL_ASKS_ZH if zh else facts.MUL_ASKS
        ask, a, b = _draw(
            heldout,
            lambda: (rng.choice(mul_asks), rng.randrange(11), rng.randrange(11)),
            lambda ask, a, b: f"{ask}|{a}|{b}",
        )
        asks, line = (ask,), f"{a} × {b} = {a * b}"
        thought = _product_thought(a, b, lang)
    opener, closer = _ends(rng, lang)
    question = _style(rng, opener + rng.choice(asks).format(a=a, b=b) + closer, lang)
    return Turn("arithmetic", question, line + ("。" if zh else "."), thought)


def _count_range(rng: random.Random) -> tuple[int, int]:
    low = rng.randrange(13) if rng.random() < 0.5 else rng.randrange(50)
    high = low + rng.randint(2, 7)
    return (low, high) if rng.random() < 0.6 else (high, low)


def _counting(rng: random.Random, heldout: bool, lang: str) -> Turn:
    a, b = _draw(heldout, lambda: _count_range(rng), lambda a, b: f"count|{a}|{b}")
    up = a < b
    if lang == "en":
        asks = facts.COUNT_UP if up else facts.COUNT_DOWN
        thought = f"I go {'up' if up else 'down'} from {a} to {b}."
    else:
        asks = facts.COUNT_UP_ZH if up else facts.COUNT_DOWN_ZH
        thought = f"从{a}{'往上' if up else '往下'}数到{b}。"
    opener, closer = _ends(rng, lang)
    question = _style(rng, opener + rng.choice(asks).format(a=a, b=b) + closer, lang)
    step = 1 if up else -1
    return Turn("counting", question, ", ".join(str(i) for i in range(a, b + step, step)), thought)


# Remembering what was said some turns ago.


def _coined_name(rng: random.Random) -> str:
    syllables = rng.randint(1, 2)
    return (
        rng.choice(facts.ONSETS)
        + rng.choice(facts.VOWELS)
        + "".join(rng.choice(facts.ONSETS) + rng.choice(facts.VOWELS) for _ in range(syllables - 1))
        + rng.choice(facts.CODAS)
    ).capitalize()


def _remembered_value(rng: random.Random, name: str, lang: str) -> str:
    if name == "number":
        return str(rng.randrange(1000))
    if lang == "zh":
        if name == "name":
            return rng.choice(facts.SURNAMES_ZH) + "".join(
                rng.sample(facts.GIVEN_ZH, rng.randint(1, 2))
            )
        return rng.choice(facts.COLOURS_ZH if name == "colour" else facts.FOODS_ZH)
    if name in ("name", "pet"):
        return rng.choice(facts.NAMES) if rng.random() < 0.4 else _coined_name(rng)
    return rng.choice(
        {"colour": facts.COLOURS, "food": facts.FOODS, "city": tuple(facts.CAPITALS.values())}[name]
    )


def _memory(rng: random.Random, heldout: bool, lang: str, about: facts.Memory) -> Memory:
    def key(tell: str, value: str) -> str:
        if about.name in ("colour", "food"):
            return f"remember|{tell}|{value}"
        return f"remember|{'name' if about.name == 'pet' else about.name}|{value}"

    tell, value = _draw(
        heldout,
        lambda: (rng.choice(about.tells), _remembered_value(rng, about.name, lang)),
        key,
    )
    said = _style(rng, tell.format(v=value), lang, keep_case=True)
    opener, closer = _ends(rng, lang)
    asked = _style(rng, opener + rng.choice(about.asks) + closer, lang)
    reply, answer = about.reply.format(v=value), about.answer.format(v=value)
    if lang == "en":
        return Memory(
            Turn("telling", said, reply, f"The user tells me: {value}."),
            Turn("remembering", asked, answer, f"The user said {value}."),
        )
    return Memory(
        Turn("telling", said, reply, f"用户告诉我：{value}。"),
        Turn("remembering", asked, answer, f"用户说过{value}。"),
    )


def _phrase(rng: random.Random, lang: str) -> str:
    """Words that mean nothing together."""
    if lang == "zh":
        return "".join(rng.choices(facts.GIVEN_ZH + facts.SURNAMES_ZH, k=rng.randint(2, 4)))
    kinds = (
        lambda: rng.choice(facts.WORDS),
        lambda: str(rng.randrange(1000)),
        lambda: rng.choice(facts.NAMES),
        lambda: rng.choice(tuple(facts.CAPITALS.values())),
        lambda: _coined_name(rng),
        lambda: _coined_name(rng).lower(),
        lambda: rng.choice(facts.FOODS + facts.COLOURS),
    )
    return " ".join(rng.choice(kinds)() for _ in range(rng.randint(1, 3)))


def _repeating(rng: random.Random, heldout: bool, lang: str) -> Turn:
    (value,) = _draw(heldout, lambda: (_phrase(rng, lang),), lambda v: f"repeat|{v.lower()}")
    if lang == "en":
        question = rng.choice(facts.REPEAT_ASKS).format(v=value)
        answer, thought = f"You said {value}.", "The user wants me to repeat."
    else:
        question = rng.choice(facts.REPEAT_ASKS_ZH).format(v=value)
        answer, thought = f"你说的是{value}。", "用户要我重复。"
    return Turn("repeat", _style(rng, question, lang, keep_case=True), answer, thought)


def _unknown(rng: random.Random, heldout: bool, lang: str, about: facts.Memory) -> Turn:
    """The question for a fact that was never told."""

    def sample() -> tuple[str, str, str]:
        opener, closer = _ends(rng, lang)
        return opener, rng.choice(about.asks), closer

    opener, ask, closer = _draw(heldout, sample, lambda o, a, c: f"unknown|{_bare(o + a + c)}")
    thought = "The user has not said it." if lang == "en" else "用户没有说过。"
    return Turn("not-told", _style(rng, opener + ask + closer, lang), about.unknown, thought)


TOPICS: dict[str, tuple[Callable[[random.Random, bool, str], Turn], float, float]] = {
    # name: (maker, weight in English, weight in Chinese)
    "self": (_chat("self"), 0.7, 0.7),
    "smalltalk": (_chat("smalltalk"), 0.5, 0.5),
    "engine": (_chat("engine"), 1.2, 0.9),
    "arithmetic": (_arithmetic, 3.6, 3.0),
    "counting": (_counting, 1.4, 0.9),
    "day": (_known("day"), 0.7, 0.6),
    "month": (_known("month"), 0.8, 0.6),
    "spell": (_known("spell"), 0.9, 0.0),
    "colour": (_known("colour"), 0.7, 0.7),
    "capital": (_known("capital"), 0.9, 0.9),
    "repeat": (_repeating, 1.4, 1.0),
}
LENGTHS = {
    1: 8.0,
    2: 5.0,
    3: 4.0,
    4: 3.0,
    5: 2.0,
    6: 1.5,
    7: 1.0,
    8: 0.7,
    10: 0.3,
    14: 0.2,
    18: 0.15,
}
LAST_TOPICS_WITH_THOUGHT = ("arithmetic", "counting", "day", "month")


def _turn(
    rng: random.Random, heldout: bool, lang: str, topics: Sequence[str] | None = None
) -> Turn:
    names = tuple(topics or TOPICS)
    column = 1 if lang == "en" else 2
    name = rng.choices(names, [TOPICS[n][column] for n in names])[0]
    return TOPICS[name][0](rng, heldout, lang)


def _other(lang: str) -> str:
    return "zh" if lang == "en" else "en"


def _dialogue(rng: random.Random, heldout: bool) -> list[Message]:
    lang = "en" if rng.random() < 0.75 else "zh"
    count = rng.choices(tuple(LENGTHS), tuple(LENGTHS.values()))[0]
    thinks = rng.random() < 0.25
    turns: list[Turn | None] = [None] * count
    abouts = list(facts.MEMORY_EN if lang == "en" else facts.MEMORY_ZH)
    rng.shuffle(abouts)
    told = []
    tries = sum(rng.random() < p for p in (0.7, 0.4, 0.3))
    for about in abouts[:tries]:
        start = rng.randrange(count)
        end = start + rng.choices((1, 2, 3, 4, 6), (2, 4, 2, 1, 1))[0]
        if end < count and turns[start] is None and turns[end] is None:
            turns[start], turns[end] = _memory(rng, heldout, lang, about)
            told.append(about)
    untold = [about for about in abouts if about not in told]
    for i in range(count):
        if turns[i] is not None:
            continue
        if untold and rng.random() < 0.05:
            turns[i] = _unknown(rng, heldout, lang, rng.choice(untold))
        elif thinks and i == count - 1 and rng.random() < 0.6:
            turns[i] = _turn(rng, heldout, lang, LAST_TOPICS_WITH_THOUGHT)
        else:
            turns[i] = _turn(rng, heldout, lang if rng.random() < 0.9 else _other(lang))
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(facts.SYSTEMS)})
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer, "topic": turn.topic})
    if thinks:
        messages[-1]["reasoning"] = turns[-1].thought
    return messages


def generate(seed: int, split: str = "train") -> Iterator[list[Message]]:
    """An endless stream of dialogues of one split, the same for the same seed.

    The last message of a dialogue is the assistant's; with a "reasoning" it is meant to be answered
    in thinking mode. Held-out dialogues hold held-out questions only.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    rng = random.Random(f"{seed}/{split}")
    while True:
        yield _dialogue(rng, split == "heldout")


def main() -> None:
    """Print dialogues as JSON lines."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=10)
    args = parser.parse_args()
    for messages in itertools.islice(generate(args.seed, args.split), args.count):
        print(json.dumps(messages, ensure_ascii=False))


if __name__ == "__main__":
    main()
