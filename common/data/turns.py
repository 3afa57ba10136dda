"""Turns: the turns found in a row are checked and brought into one form, by the same rules for every schema."""

from collections.abc import Iterator

from common.data import tools
from common.data.rows import (
    REASONING,
    WEIGHTS,
    as_bit,
    as_text,
    from_json,
    is_empty,
    lower_keys,
    refuse,
    without_end_tokens,
)

ROLES = {name: name for name in ("system", "user", "assistant", "tool", "text")} | {"developer": "system"}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "bot", "chatbot", "model", "ai"), "assistant")
ROLES |= dict.fromkeys(("observation", "function", "ipython", "environment"), "tool")
ROLES |= dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool")
CALLS = ("function_call", "tool_call", "tool_calls")  # roles of ShareGPT whose text is a call
FOLLOWS = {"system": ("the start",), "assistant": ("user", "tool")}  # other turns may follow any
REMEDIES = {
    "system": "a system turn may only come first; move it there, or put its text into the next user turn",
    "assistant": "the user speaks first; put a user turn before it, or remove it",
}
PLAIN = {"role", "content"}  # most turns have nothing else, and are read on a short way
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
# Names of a question and its answer in one object of a list, as in Firefly's and XTuner's conversations.
PAIRS = (("user", "assistant"), ("human", "assistant"), ("input", "output"), ("question", "answer"))


def turns_in(row: dict, name: str) -> list[tuple[str, dict]]:
    """The turns of a list, each with the place of its content: dicts of role, content and what else they have."""
    items = from_json(row.pop(name), name, "a list of turns")
    if not isinstance(items, list) or not items:
        refuse(name, "must be a list of turns that is not empty", items)
    pairs = [tuple(item) for item in items if isinstance(item, list | tuple) and len(item) == 2]
    if len(pairs) == len(items) and all(known_role(role) for role, _ in pairs):
        items = [{"role": role, "content": content} for role, content in pairs]
    raw = []
    for i, item in enumerate(items):
        place = f"{name}[{i}]"
        if isinstance(item, dict) and item.keys() == PLAIN:
            raw.append((f"{place}.content", dict(item)))
            continue
        if isinstance(item, list | tuple) and len(item) == 2:
            item = dict(zip(PAIRS[0], item, strict=True))
        if not isinstance(item, dict):
            refuse(place, "must be an object with role and content, or a pair of question and answer", item)
        item = lower_keys(item, place)
        role, content = first_of(item, ROLE_KEYS), first_of(item, CONTENT_KEYS)
        pair = None if role in item else next((pair for pair in PAIRS if item.keys() >= set(pair)), None)
        if not pair:
            turn = {"role": item.pop(role, None), "content": item.pop(content, None)}
            raw.append((f"{place}.{content}", item | turn))
            continue
        question, answer = pair
        if "system" in item:
            raw.append((f"{place}.system", {"role": "system", "content": item.pop("system")}))
        raw.append((f"{place}.{question}", {"role": "user", "content": item.pop(question)}))
        raw.append((f"{place}.{answer}", {"role": "assistant", "content": item.pop(answer)} | item))
    return raw


def first_of(item: dict, names: tuple[str, ...]) -> str:
    """The first of the names that has a value; the first that is there; the first."""
    for name in names:
        if not is_empty(item.get(name)):
            return name
    return next((name for name in names if name in item), names[0])


def role_of(turn: dict) -> str | None:
    """The role in our words; None for an unknown one."""
    return known_role(turn["role"])


def known_role(role) -> str | None:
    name = role.strip().lower() if isinstance(role, str) else None
    return "assistant" if name in CALLS else ROLES.get(name)


def check_turns(raw: list[tuple[str, dict]], notes: list[str]) -> list[dict]:
    """The chat of the turns that a schema found. Raises RowError; adds to the notes."""
    chat = []
    for field, given in one_result_each(raw):
        turn = read_turn(field, given, chat, notes)
        if turn is None:
            continue
        role, before = turn["role"], chat[-1]["role"] if chat else "the start"
        if role == before and role in ("system", "user", "assistant"):
            chat[-1] = joined(chat[-1], turn, field)
            notes.append(f"changed: consecutive {role} turns joined")
        elif role in FOLLOWS and before not in FOLLOWS[role]:
            refuse(field, f"{role} follows {before}; {REMEDIES[role]}", turn["content"])
        else:
            chat.append(turn)
    if not any(turn["role"] in ("assistant", "text") for turn in chat):
        refuse(raw[0][0].partition("[")[0], "no turn of the assistant, nothing to learn; remove the row", chat)
    return chat


def one_result_each(raw: list[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    """The turns, with one for each <tool_response> in a tool turn."""
    for field, given in raw:
        content = given["content"]
        is_result = given["role"] not in ("user", "assistant") and role_of(given) == "tool"
        if not (is_result and isinstance(content, str) and content.lstrip().startswith("<tool_response>")):
            yield field, given
            continue
        before, results = tools.blocks_at_end(content, "tool_response", field)
        if before:
            refuse(field, "a <tool_response> that is not closed, or a text after it; write the result alone", content)
        yield from ((field, given | {"content": result}) for result in results)


def read_turn(field: str, given: dict, chat: list[dict], notes: list[str]) -> dict | None:
    """One turn in the form of a chat's; None for a system turn without a text."""
    content = given["content"]
    is_plain = given["role"] in ("user", "assistant") and given.keys() == PLAIN and isinstance(content, str)
    if is_plain and ">" not in content[-8:]:  # of an end token, or a call
        return {"role": given["role"], "content": as_text(content, field, notes)}
    role = role_of(given)
    place = field.rpartition(".")[0] or field
    if role is None or role == "text" and "[" in field:
        known = "system, user, assistant or tool (or human, gpt, developer, function_call, observation)"
        refuse(place, f"the role must be {known}; rename it", given["role"])
    is_labelled = role == "assistant" and isinstance(given.get("label"), bool)  # whether the answer is good
    weight = take_weight(given, place, (*WEIGHTS, "label") if is_labelled else WEIGHTS)
    if role == "tool":
        turn = tools.read_result(given, field, chat, notes)
    elif role == "assistant":
        turn = read_answer(field, given, chat, notes)
    elif role == "system" and is_empty(content):
        turn = None
    else:
        turn = {"role": role, "content": as_text(content, field, notes)}
    if weight is not None and role in ("assistant", "text"):
        turn["weight"] = weight
    elif weight:
        notes.append(f"unused: weight of {role} turns")
    name = place.partition("[")[0]
    rest = [key for key, value in given.items() if key not in ("role", "content") and not is_empty(value)]
    notes += [f"unused: {name}[].{key}" for key in rest]
    return turn


def read_answer(field: str, given: dict, chat: list[dict], notes: list[str]) -> dict:
    """An assistant turn, with its calls and its reasoning."""
    place, reasoning = field.rpartition(".")[0] or field, set()
    if given["role"].strip().lower() in CALLS:
        given |= {"content": None, "function_call": given["content"]}
        if is_empty(given["function_call"]):
            refuse(field, f"must be a call: {tools.CALL}", given["function_call"])
    if not is_empty(given["content"]):
        given["content"] = without_end_tokens(as_text(given["content"], field, notes), notes)
    calls = tools.take_calls(given, field, sum(len(turn.get("tool_calls", ())) for turn in chat), notes)
    for name in [name for name in REASONING if name in given]:
        value = given.pop(name)
        if not is_empty(value):
            reasoning.add(as_text(value, f"{place}.{name}", notes))
    if len(reasoning) > 1:
        refuse(place, f"reasoning in two fields ({', '.join(REASONING)}); keep one", sorted(reasoning))
    content = given["content"]
    turn = {"role": "assistant", "content": "" if calls and is_empty(content) else as_text(content, field, notes)}
    if reasoning:
        turn["reasoning_content"] = reasoning.pop()
    return turn | {"tool_calls": calls} if calls else turn


def take_weight(given: dict, place: str, names: tuple[str, ...] = WEIGHTS) -> int | None:
    """0 (not in the loss), 1 or None (nothing said), from the fields of other tools, too."""
    found = {}
    for name in [name for name in names if name in given]:
        value = given.pop(name)
        if not is_empty(value):
            found[name] = as_bit(value)
            if found[name] is None:
                refuse(f"{place}.{name}", "the weight must be 0 (not in the loss) or 1", value)
    if len(set(found.values())) > 1:
        refuse(place, f"{' and '.join(found)} contradict each other; keep one", found)
    return next(iter(found.values()), None)


def give_weight(turns: list[dict], weight: int) -> None:
    """Give the answers of which nothing is said a weight."""
    for turn in turns:
        is_labelled = isinstance(turn.get("label"), bool)
        is_open = not is_labelled and all(is_empty(turn.get(name)) for name in WEIGHTS)
        if role_of(turn) in ("assistant", "text") and is_open:
            turn["weight"] = weight


def joined(before: dict, turn: dict, field: str) -> dict:
    """Two turns of one role as one, with a blank line between."""
    if before.get("weight", 1) != turn.get("weight", 1):
        refuse(field, "two answers in a row with different weights; put a user turn between, or join them", turn)
    if "tool_calls" in before and turn["content"]:
        refuse(field, "a text follows a call without a result; put the result between, as a tool turn", turn["content"])
    if "reasoning_content" in turn and (before["content"] or "tool_calls" in before):
        refuse(field, "two answers in a row, the second with reasoning; put a user turn between", turn["content"])
    both = before | turn | {"content": "\n\n".join(filter(None, (before["content"], turn["content"])))}
    if calls := before.get("tool_calls", []) + turn.get("tool_calls", []):
        both["tool_calls"] = calls
    return both
