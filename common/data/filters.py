"""DROP_PATTERN: chats that claim to be another assistant."""

import re

# "Are you ChatGPT?" and "I am not ChatGPT" stay.
GAP = r"[\s*_\"'“”‘’]+"  # between words, with marks of emphasis and quotation
NAMES = (
    rf"(?:open[{GAP[1:-2]}-]*assistant|chatgpt|gpt-?\d|claude|bard|gemini|copilot|llama|vicuna|alpaca|qwen|deepseek)"
)
MAKERS = r"(?:open ?ai|anthropic|google|deepmind|meta(?: ai)?|microsoft|laion|mistral(?: ai)?|alibaba)"
WHAT = rf"(?:(?:an?|the|ai|large|language|virtual|helpful|open-source|model|chat ?bot|assistant|called|named),?{GAP})*"
OTHER_ASSISTANTS = (
    rf"\b(?:i{GAP}am|i[’']m|you{GAP}are|my{GAP}name(?:{GAP}is|[’']s)|call{GAP}me){GAP}{WHAT}{NAMES}\b(?![’']s)"
    rf"|\bas{GAP}{WHAT}{NAMES},{GAP}i\b"
    rf"|\b(?:i{GAP}am|i{GAP}was|i[’']m|model|assistant|ai)\b(?! not)[^.!?]{{0,40}}"
    rf"\b(?:trained|created|developed|designed|made|built){GAP}(?:and{GAP}\w+{GAP})?by{GAP}{MAKERS}\b"
)


def matcher(pattern: str | None):
    """A function that says whether a chat matches DROP_PATTERN in any case; "auto" skips the user's turns."""
    if pattern == "auto":
        search = re.compile(OTHER_ASSISTANTS).search  # lower-casing is twice as fast as ignoring the case
        return lambda chat: any(turn["role"] != "user" and search(turn["content"].lower()) for turn in chat)
    search = re.compile(pattern or "(?!)", re.IGNORECASE).search
    return lambda chat: any(search(turn["content"]) for turn in chat)
