"""Every text template that TRL ships: trained with the exact mask, or refused; docs/data.md has the table."""

import itertools
import re
from pathlib import Path

import pytest
import trl
from conftest import ROOT
from tokenizers import AddedToken
from transformers import AutoTokenizer

from common.cli import UserError
from common.data import templates
from common.data.checks import prompt_problems

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
CONTROL = re.compile(
    r"<\|[^|<>\s'%]+\|?>|<[^<>|\s'%]*\|>|<\uff5c[^<>]+\uff5c>|<(?:start|end)_of_\w+>|<end_of_utterance>|\[gMASK\]|<sop>|</?s>"
)
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")  # tokens, but not special ones
ENDS = dict(gptoss="<|return|>", phi3="<|endoftext|>", phi3_5="<|endoftext|>", glm4moe="<|endoftext|>", gemma="<eos>")
TOOLS = [{"type": "function", "function": {"name": "get_time", "description": "T", "parameters": {"type": "object",
    "properties": {"tz": {"type": "string", "description": "zone"}}}}}]  # fmt: skip
CALL = [{"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": {"tz": "UTC"}}}]
ASK, ANSWER = {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi, friend."}
MORE, LAST = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Bye."}
SYSTEM, REASONING = {"role": "system", "content": "Be terse."}, {"reasoning_content": "Let me see."}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "get_time", "content": "12:00"}
CHATS = {
    "two answers": [ASK, ANSWER, MORE, LAST],
    "system": [SYSTEM, ASK, ANSWER],
    "reasoning": [ASK, ANSWER | REASONING, MORE, LAST | REASONING],
    "tools": [ASK | {"tools": TOOLS}, {"role": "assistant", "content": "", "tool_calls": CALL}, RESULT, ANSWER],
}


def tokenizer_of(name: str, folder) -> AutoTokenizer:
    """A small tokenizer with a published template and its control tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokens = sorted({*CONTROL.findall(text), *ENDS.values(), "<bos>", "<|im_end|>"})
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in sorted(set(PLAIN.findall(text)))])
    tokenizer.eos_token = ENDS.get(name, "<|im_end|>")
    if "bos_token" in text:
        tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = text
    return tokenizer


def learned(tokenizer, encoder, chat, train_on="assistant") -> list[str]:
    """The learned passages; each must follow the very prompt that asks for it."""
    passages = []
    answers = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
    for ids, mask in encoder.encode([chat], train_on)[0].sequences():
        runs = [
            (kept, [i for i, _ in run]) for kept, run in itertools.groupby(zip(ids, mask, strict=True), lambda p: p[1])
        ]
        before = []
        for in_loss, run in runs:
            if in_loss:
                i = answers[len(passages)] if train_on != "last" else answers[-1]
                chat_before = encoder.template.as_written(chat[:i])
                prompt = tokenizer.apply_chat_template(
                    chat_before, tools=chat[0].get("tools"), add_generation_prompt=True, tokenize=False
                )
                assert tokenizer.decode(before) == prompt
                assert encoder.prompt(chat[:i]) == [int(token) for token in before]
                passages.append(tokenizer.decode(run))
            before += run
    return passages


def outcome(tokenizer, encoder, chat) -> str:
    try:
        rows = encoder.encode([chat])[0].sequences()
    except UserError as error:
        assert "CHAT_TEMPLATE=chatml" in str(error)  # the remedy
        return "refused"
    passages = learned(tokenizer, encoder, chat)
    answers = [turn for turn in chat if turn["role"] == "assistant"]
    assert len(passages) == len(answers)
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for passage, turn in zip(passages, answers, strict=True):
        call = [call["function"]["name"] for call in turn.get("tool_calls", ())]
        for part in (turn["content"], turn.get("reasoning_content", ""), *call):
            assert part in passage
        assert any(passage.endswith(token) for token in control)
        assert not any(part in passage for part in ("Hello there", "And now?", "Be terse.", "12:00"))
        if not call:
            assert passage.endswith(turn["content"] + encoder.end_token) or encoder.end_token == "<|END_OF_TURN_TOKEN|>"
    return "yes" if len(rows) == 1 else "a row for each answer"


def table_row(name: str, folder) -> str:
    tokenizer = tokenizer_of(name, folder)
    try:
        encoder, note = templates.set_template(tokenizer, None)
    except UserError as error:
        assert "CHAT_TEMPLATE=chatml" in str(error)
        return f"| `{name}` | refused | | | | |"
    source = "TRL's copy" if "TRL's copy" in note else "own"
    cells = [outcome(tokenizer, encoder, chat) for chat in CHATS.values()]
    if "no system messages" in note:
        cells[1] = "in the first question"
    assert not list(prompt_problems(tokenizer, encoder))
    return f"| `{name}` | {source} | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_trained_with_the_exact_mask_or_refused_as_the_docs_say(name, tokenizer_folder):
    assert table_row(name, tokenizer_folder) in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()


def test_the_docs_name_no_other_template():
    rows = re.findall(
        r"^\| `(\w+)` \| (?:own|TRL's copy|refused) ", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE
    )
    assert rows == NAMES
