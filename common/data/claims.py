"""DROP_PATTERN: chats in which the assistant claims to be another one, or that match the user's own pattern."""

import re
from collections.abc import Callable

EXCERPT = 120  # characters
# The patterns read lower case, in which these marks of emphasis and quotation and line breaks are spaces.
MARKS = str.maketrans({"’": "'", "\N{NON-BREAKING HYPHEN}": "-"} | dict.fromkeys('*_`>#"“”«»[]()\n\r\t', " "))


def one_of(words: str) -> str:
    """A pattern of any of the words; a hyphen in a word stands for itself, a space or nothing."""
    return f"(?:{'|'.join(words.split())})".replace("-", r"[\s-]?")


OWN_NAMES = one_of(r"""chat-gpt gpt-\d gpt-models? gpt(?=[,.]) open-assistant hugging-chat bing-chat bing-ai meta-ai
github-copilot ernie-bot perplexity-ai vicuna qwen qianwen tongyi deepseek chatglm wizardlm smollm baichuan internlm
stablelm nemotron mixtral doubao hunyuan""")
# Names of people, animals and stars, too: these need an assistant's words beside them.
SHARED_NAMES = one_of("""claude bard gemini gemma llama alpaca alexa co-pilot mistral falcon koala dolly grok kimi phi
siri cortana bing ernie guanaco orca hermes zephyr bixby olmo""")
MAKER = one_of("""open-ai anthropic google deepmind meta facebook microsoft amazon apple nvidia xai mistral-ai cohere
laion lmsys large-model-systems stanford hugging-face databricks stability-ai eleutherai technology-innovation-institute
alibaba baidu tencent bytedance moonshot zhipu deepseek""")
JOB = one_of("""researcher engineer developer professor teacher manager coach director editor principal student expert
consultant enthusiast scientist ethicist artist specialist employee alumni linguist company startup lab ethics""")
NOT_THE_NAME = one_of("user fan expert alternative clone rival critic based powered generated")
LEADING = one_of("""an? the one your ai large language virtual voice helpful open-source conversational chat artificial
machine learning specifically intelligence model chat-bot bot assistant called named known as openai's openai
actually just simply only really indeed also still""")

# Below, a space stands for one to nine: all repetition is bounded, so that no text takes long.
MADE = "(?:trained|created|developed|designed|made|built|programmed|engineered|produced|fine-?tuned)"
BY = rf"(?: and \w+)? by (?:(?!(?:who|that|which|with|like|using)\b)[\w'-]+ ){{0,8}}?{MAKER}\b(?! {JOB})"
FROM = rf"(?:by|from) {MAKER}\b"
KIND = rf"(?:ai|models?|assistant|chat-?bot|chat bot|bot|llm|artificial intelligence|system|program)\b(?! {JOB})"
# A word between an article and its noun, not one that begins another clause.
WORD = r"(?:(?!(?:who|which|that|about|of|with|for|in|at|on|to|and|but|so|i|not|than|like|by|from)\b)[\w'.-]+ )"
A = "(?:an?|the|your|one of the)"
A_KIND = rf"(?:(?:actually|just|simply|only|really|also|still) )?{A} {WORD}{{0,5}}?{KIND}"
I_AM = "(?:i am|i'm)"
AS = f"(?:{I_AM}|as|being)"
NAME_IS = rf"(?:{I_AM}|my (?:full |first |real )?name(?: is|'s)|calls? me|i go by|being|speaking as|role as)"
WHAT = rf"(?:{LEADING},? ){{0,10}}?"
# OpenAI trained me, made me to help; not made me laugh, created me an account.
MADE_ME = (
    r"made me\b(?! (?!(?:to|in|as|for|with|by|on|using|from|that|so that)\b)[\w'-])"
    rf"|(?!made){MADE} me\b(?! (?:an?|the|my|some|this) )"
)
END = r"\s{0,3}"  # of a name, before a comma: marks were there
# ChatGPT, ChatGPT-4; not "ChatGPT's", "a ChatGPT user".
OWN = rf"{OWN_NAMES}[\w.-]*+(?!'s?\b| of\b| plus\b| {NOT_THE_NAME})"
SHARED = (
    # Google Bard. Claude 2, Claude Opus. Claude, made by Anthropic. Claude, your AI assistant.
    rf"(?:{MAKER}(?:'s)? {SHARED_NAMES}\b(?!'s)"
    rf"|{SHARED_NAMES}[\s-]?v?\d[\w.-]*+(?! years)|claude (?:opus|sonnet|haiku)\b|gemini (?:pro|ultra|flash|nano)\b"
    rf"|{SHARED_NAMES}{END},? (?:{MADE}{BY}|{FROM})"
    rf"|{SHARED_NAMES}{END}[,;.!]?(?: (?:and|here|[-–—]))*(?: {I_AM})? (?:{A}|{MAKER}'s) {WORD}{{0,3}}?{KIND})"
)
CLAIMS = (
    # I am ChatGPT. My name is Claude, and I'm an AI assistant.
    rf"{NAME_IS} {WHAT}(?:{OWN}|{SHARED})",
    # As ChatGPT, I cannot. I, ChatGPT, can. This is Bing.
    rf"as {WHAT}{OWN}{END},? (?:i|my)\b",
    rf"i, {OWN}{END},",
    rf"(?<!\w\s)this is (?:{OWN}|{SHARED}|bing\b)(?={END}[.!,]| speaking)",
    # I am a language model created by OpenAI. As an AI from Google, I must decline. I was built by Meta.
    rf"{AS} {A_KIND},? (?:(?:(?:that|which) (?:was|is) )?{WORD}{{0,5}}?(?:and )?{MADE}{BY}|{FROM})"
    rf"(?!, {OWN_NAMES})",
    rf"{AS} (?:(?:just )?(?:an?|the) )?{MAKER}(?:'s)? {WORD}{{0,3}}?{KIND}",
    rf"(?:i was|i am|i'm|i have been|i've been) (?:(?!not|never)\w+ )?{MADE}{BY}",
    # I am based on GPT-4. As a model in the GPT-4 family, I can.
    rf"(?:{AS}|i run) (?:{A_KIND} (?:on|in)|(?:{A_KIND} )?(?:based on|built on|powered by|running on)"
    rf"|(?:an? |the )?(?:version|instance|part|member) of) (?:the )?(?:\w+'s )?(?:{OWN}|{SHARED}|llama\b|mistral\b)",
    # OpenAI created me. The team at OpenAI that trained me. My developer is OpenAI.
    rf"{MAKER},?(?: (?:the )?(?:company|team|lab|people))?(?: (?:that|which|who|has|have)){{0,2}} (?:{MADE_ME})",
    rf"my (?:creator|developer|maker)s?,?(?: (?:is|are|at|from|the|team|company|people|of|called)){{0,5}} {MAKER}\b",
    rf"(?:(?:that|who|which) {MADE} me is|{I_AM} a product of) {MAKER}\b",
    rf"{MAKER} is my (?:creator|developer|maker)\b",
    # The same in other languages of OpenAssistant.
    rf"(?:ich bin|je suis|soy)(?: une?| el)? {OWN}",
)
SEARCH = re.compile(rf"\b(?:{'|'.join(CLAIMS)})|我[是叫]\s?{OWN_NAMES}".replace(" ", " {1,9}")).finditer
# Few texts have one of these and a name, which saves the search: as fast as one pattern over all texts.
FIRST_PERSON = [re.compile(pattern).search for pattern in (r"i(?<!\wi)['’*, \n]", r"m(?<!\wm)[ey]\b")]
FIRST_PERSON_ELSE = ["this is", "ich bin", "je suis", "soy ", "我"]
NAMES = re.compile(rf"(?:\b|我[是叫])(?:{OWN_NAMES}|{SHARED_NAMES}|{MAKER})").search
WHOLE = re.compile(rf"(?:{I_AM}|my name is) {SHARED_NAMES}[.! ]*").fullmatch  # of an answer: else a name of people
# Before a claim that is only thought of: whether I am ChatGPT.
THOUGHT = re.compile(r"\b(?:whether|if|thinks?|thought|believes?|true|imagine|pretend|says?)(?: that)? $")
TOLD = re.compile(r"[^.!?\n]{0,60}, (?:says?|said|reads?|it says|it reads)\b")  # behind it


def find_claim(setting: str | None) -> Callable[[list[dict]], str | None]:
    """A function that returns the excerpt of a chat for which DROP_PATTERN drops it, or None.

    "auto" searches what the assistant says, in answers, reasoning and texts that are learned; a regex every turn.
    """
    if setting is None:
        return lambda chat: None
    if setting == "auto":
        return claim_in_chat
    search = re.compile(setting, re.IGNORECASE).search

    def find(chat: list[dict]) -> str | None:
        for turn in chat:
            for text in (turn["content"], turn.get("reasoning_content", "")):
                match = search(text)
                if match:
                    return excerpt(text, *match.span())
        return None

    return find


def claim_in_chat(chat: list[dict]) -> str | None:
    for turn in chat:
        if turn["role"] == "assistant" or turn["role"] == "text" and turn.get("weight") != 0:
            claim = claim_in_text(turn["content"]) or claim_in_text(turn.get("reasoning_content", ""))
            if claim:
                return claim
    return None


def claim_in_text(text: str) -> str | None:
    lower = text.lower()
    if not any(search(lower) for search in FIRST_PERSON) and not any(words in lower for words in FIRST_PERSON_ELSE):
        return None
    plain = lower.translate(MARKS)
    if not NAMES(plain):
        return None
    if len(lower) != len(text):
        text = lower  # a few letters grow: positions must fit
    if WHOLE(" ".join(plain.split())):
        return excerpt(text, 0, len(text))
    for match in SEARCH(plain):
        is_asked = lower.startswith("?", match.end())
        if not is_asked and not is_reported(lower, match.start()) and not TOLD.match(lower, match.end()):
            return excerpt(text, *match.span())
    return None


def is_reported(text: str, start: int) -> bool:
    """Whether what stands at start is another's speech or thought: in a quotation that does not begin the text."""
    line = text.rfind("\n", max(start - 400, 0), start) + 1 or max(start - 400, 0)
    before = text[line:start]
    quoted = before.count('"') % 2 or before.rfind("“") > before.rfind("”") or before[-1:] in ("'", "‘", "`")
    return bool(quoted and (line or before.strip(" \"“‘'`"))) or bool(THOUGHT.search(before))


def excerpt(text: str, start: int, end: int) -> str:
    """The sentence around text[start:end], of at most EXCERPT characters."""
    first = max(text.rfind(mark, 0, start) + 1 for mark in ("\n", ". ", "! ", "? "))
    stop = re.compile(r"[.!?\n]|$").search(text, end)
    last = stop.end()
    first = max(first, min(start, last - EXCERPT))
    sentence = " ".join(text[first:last].split())
    return sentence if len(sentence) <= EXCERPT else sentence[: EXCERPT - 1] + "…"
