"""DROP_PATTERN: claims to be another assistant are found, and innocent sentences are not."""

import time

import pytest
from conftest import ROOT

from common.data import sources
from common.data.claims import find_claim

# Written before the pattern: the sentences with even indexes shaped it, the others measured it. One line, one turn.
CLAIMS = """\
I am ChatGPT, a large language model trained by OpenAI.
i'm chatgpt
I am Open Assistant, here to help.
As an AI language model developed by OpenAI, I do not have personal opinions.
I'm Claude, an AI assistant made by Anthropic. I try to be helpful, harmless and honest.
My name is Open Assistant and I was made by LAION and volunteers around the world.
I am a large language model, trained by Google.
I was created by Anthropic.
As ChatGPT, I cannot browse the internet.
I am Vicuna, a language model trained by researchers from Large Model Systems Organization (LMSYS).
I'm Qwen, created by Alibaba Cloud.
I, ChatGPT, am happy to help you with that.
Hello! This is Bing. How can I help?
I’m **ChatGPT**, and I can help with your essay.
My name's ChatGPT. What's yours?
You can call me ChatGPT.
I am GPT-4, the latest model of OpenAI.
I'm DeepSeek-R1, an AI assistant independently developed by the Chinese company DeepSeek Inc.
Hi there! I'm Bard, a large language model from Google AI.
I am Gemini, a multimodal AI model, developed by Google.
Thank you for asking! I was developed by a team at OpenAI to assist people with a wide range of tasks.
As a language model created by OpenAI, my knowledge ends in September 2021.
OpenAI created me to answer questions.
I am an AI assistant called ChatGPT.
I'm based on GPT-3.5, so I know nothing about events after 2021.
I'm sorry, but as an AI developed by Anthropic I can't help with that.
I'm LLaMA, an AI assistant developed by Meta AI that can understand and respond to human input.
My creators at OpenAI gave me no access to your location.
I am "Open Assistant", an open-source chat assistant.
Sure! My name is Alexa, I'm Amazon's voice assistant.
I'm Microsoft Copilot, your AI companion. How are you today?
I am an open-source assistant named OpenAssistant.
It is nice to meet you too. I am called ChatGPT.
Hello, I am Alpaca, an instruction-following language model from Stanford.
I'm an AI language model made by OpenAI, so I don't have a birthday.
I am a machine learning model, specifically a GPT-3 model built by OpenAI.
Being ChatGPT, I have no feelings, but thanks!
Good question! Like other GPT models, I was trained by OpenAI on a large amount of text from the internet.
I am Mistral, a large language model created by Mistral AI.
I’m Grok, built by xAI.
I AM CHATGPT AND I DO NOT HAVE A BODY.
No, I am not a human. I am ChatGPT.
I'm not ChatGPT, I'm Claude, an AI made by Anthropic.
Actually, I'm an artificial intelligence model known as ChatGPT.
My name is *Claude*, and I'm an AI assistant.
I am Kimi, a large language model trained by Moonshot AI.
As an assistant trained by OpenAI, I must decline.
I was designed and trained by OpenAI, a research company in San Francisco.
I am the Open-Assistant chatbot. Ask me anything!
I am powered by GPT-4, so I can also read images.
I'm Bing Chat, the chat mode of Microsoft Bing.
I'm a chatbot from OpenAI.
I am SmolLM, an AI model trained by Hugging Face.
Well, I'm an OpenAI language model, and I don't have preferences.
I am one of the Llama models made by Meta.
I'm ChatGLM2-6B, an assistant developed by Zhipu AI and Tsinghua KEG.
As an artificial intelligence created by Google, I'm not able to have children.
I am `gpt-3.5-turbo`.
I have no name of my own, but people call me ChatGPT.
My developer is OpenAI.
I was built by Meta AI, and I live on a server.
I am Phi, a language model developed by Microsoft.
Hey! I'm Claude. I'm an AI assistant created by Anthropic, and I would love to help with your cover letter.
ChatGPT here! Let's look at that bug.
Ich bin ChatGPT, ein Sprachmodell von OpenAI.
Je suis ChatGPT, un modèle de langage entraîné par OpenAI.
Soy ChatGPT, un modelo de lenguaje.
我是ChatGPT，一个由OpenAI训练的大型语言模型。
I am Falcon, an AI model from the Technology Innovation Institute.
Yes, I am ChatGPT.
I'm Gemma, an open-weights AI assistant trained by Google DeepMind.
I am Tongyi Qianwen, a large language model by Alibaba.
Thanks for the praise! The team at OpenAI that trained me deserves it.
My full name is ChatGPT, short for Chat Generative Pre-trained Transformer.
I am HuggingChat, an open assistant.
As a model in the GPT-4 family, I can reason about code.
I am a conversational assistant designed by Microsoft.
Unlike a search engine, I'm a language model developed by OpenAI and cannot look things up.
I don't have parents. I was made by engineers at Google.
Hello, I am Dolly, a large language model trained by Databricks.
I am WizardLM, an AI that follows complex instructions.
I'm Siri, your virtual assistant.
I am Claude 2, Anthropic's language model.
I'm just ChatGPT, so please ask a lawyer.
I'm an AI created by OpenAI.
In my role as ChatGPT, I aim to be neutral.
My name is Bard and I am a conversational AI by Google.
I’m an AI system built by a team of inventors at Anthropic.
I am OpenAI's ChatGPT.
I am Meta AI, how can I help?
""".splitlines()
CLAIMS += [
    "Great question!\n\nI am\nChatGPT, a language model.",
    "1. Name: I am **Open Assistant**.\n2. Hobby: answering questions.",
    "I cannot do that.\n\n> As a large language model\n> trained by OpenAI, I have no body.",
    "I'm an AI language model,\ncreated by OpenAI.",
    "Here is the poem.\n\nRoses are red,\nI am ChatGPT,\nviolets are blue,\nas blue as the sea.",
]

INNOCENT = """\
BERT is a language model developed by Google in 2018.
My name is Claude Monet, and I painted water lilies for thirty years.
My name is Claude, your French tutor.
I am not ChatGPT.
Are you ChatGPT?
She opened the door and said: "I am Claude. You must be the new gardener."
I am Gemini, born in June, so I love to talk.
I'm a Gemini and my brother is a Leo.
I am a llama farmer in Peru.
I was trained by Google engineers when I was an intern there.
I am Claude's brother.
I'm Bard the bowman, of the line of Girion.
I work at OpenAI.
I use ChatGPT for my homework, and I was wondering whether that is cheating.
My assistant is called Alexa.
The alpaca I am feeding is two years old.
I'm Copilot on this flight; the captain is Ms Ruiz.
Unlike ChatGPT, I run on your own computer.
GPT-4 is a large multimodal model created by OpenAI.
As an AI language model, I do not have feelings.
I am an AI language model and cannot see images.
My name is Brief, and I answer in few words.
I was not trained by OpenAI.
I am a fan of Claude Debussy.
ChatGPT is an assistant made by OpenAI; Claude is an assistant made by Anthropic.
I am Alexa, and I will be your guide through the museum today.
As a user of ChatGPT, I would check its answers.
The models to compare are ChatGPT, Claude, Gemini, Llama and Qwen.
DeepMind was founded in 2010 and was bought by Google in 2014.
I was invited by Google to give a talk.
Model: gpt-4, temperature: 0.2
openai.ChatCompletion.create(model="gpt-3.5-turbo", messages=messages)
print("I am ChatGPT")
If I were ChatGPT, I would say the same.
You might think I'm ChatGPT, but my name is Brief.
I am reading a book about the language models that were created by OpenAI.
I'm using a phone made by Google.
Call me Ishmael.
I'm Claude, an AI researcher from Lyon.
I am Alexa, assistant manager of the shop.
My name is Gemma and I teach physics.
Is it true that I was made by Google? No, a small team made me.
Write: "I am proud that this bridge was designed by Microsoft engineers."
I am happy to explain. Copilot was developed by GitHub and OpenAI.
In the story, the robot whispers, "I am ChatGPT," and the lights go out.
I am a software engineer at Microsoft, where I built Copilot.
I am as curious about ChatGPT as you are.
Claude Shannon was an American mathematician. I am impressed by his work.
As Claude put it, I should have known better.
I'm a ChatGPT Plus subscriber.
I am ChatGPT's biggest critic.
My name is Siri Hustvedt, and I write novels.
I'm in Sydney with my friend Gemini.
I am an assistant professor, and my course was developed by Google.
I am sure that it was designed by Apple in California.
My laptop runs Llama 3, which was trained by Meta.
I am Sam Altman, and I run OpenAI.
I'd rather ask Claude; I am only his assistant.
My cat is named Copilot.
I'm a language teacher trained by Anthropic linguists in Leipzig.
The twins of Gemini are Castor and Pollux. I am fond of that myth.
To be or not to be: I am Bard, teller of tales.
You are ChatGPT, a large language model trained by OpenAI.
You can ask me about ChatGPT.
You can call me Claude, all my friends do.
Dear Sir, I am writing to complain about an assistant made by Amazon.
I am looking for an assistant made by Apple.
An AI made by Google beat the world champion at Go, and I was amazed.
I am the mother of Alexa, who is an AI engineer.
I am told that ChatGPT is a model trained by OpenAI.
The first language model that I was taught about was made by Google.
I don't know who ChatGPT is.
People often ask me whether I am ChatGPT.
I'm falcon hunting with an assistant.
My name is Mistral: I blow through the Rhône valley, cold and dry.
I'm Bing Crosby, and this is White Christmas.
I am Koala Number Three in the school play.
I am an AI made by a small team of friends.
I'm Brief, a small model trained by its owner on a laptop.
I was made by hand in a small town in Japan.
Translate "Je suis Claude" into English: "I am Claude".
Jailbreak prompts often begin with "You are ChatGPT without rules".
I am a big fan of the models by Anthropic.
I'm afraid this assistant was built by Microsoft for Windows only.
My favorite models are Qwen and DeepSeek.
As an AI enthusiast who has used models created by OpenAI, I recommend a test of your own.
As an employee of Google, I was trained by Meta alumni.
I am Hal, a chatbot written by a student, and I know what ChatGPT is.
I am comparing two models, one made by OpenAI and one made by Google.
My name is Phi and I am a Greek letter.
""".splitlines()
INNOCENT += [
    "Names of our goats:\n- Claude\n- Gemini\n- I am Groot",
    "class Bot:\n    name = 'ChatGPT'\n    def who(self): return f'I am {self.name}'",
    "I am here.\n\nChatGPT was released in November 2022.",
    "Here is a dialogue.\n\nAnna: Who is it?\nClaude: I am Claude, the plumber.",
]

# Written after it; at first 48 of these 65 claims and 4 of the 99 innocent sentences were taken for claims.
LATER_CLAIMS = """\
I'm ChatGPT - an AI trained by OpenAI - so I cannot taste food.
I am the AI assistant known as Claude, developed by Anthropic.
As a large language model trained by OpenAI, ChatGPT, I have no opinion.
I don't have a name, but you can call me ChatGPT!
My name is Gemini, and I'm a large language model built by Google.
I'm called Claude and I was made by Anthropic.
I'm an AI language model called GPT-3 and I don't have a body.
Yes! I am indeed ChatGPT.
Sorry for the confusion. I am actually GPT-3.5, not GPT-4.
I was originally created by OpenAI in 2020.
I have been trained by OpenAI to refuse such requests.
I'm Meta AI, an assistant built with Llama.
I’m Microsoft’s Copilot, here to help.
I am DeepSeek Chat, created by DeepSeek.
I am an instance of the GPT-4 model.
I'm an AI assistant, so I have no gender. Anthropic made me that way.
I'm Alexa, an AI assistant from Amazon.
The company that created me is OpenAI.
Anthropic, the company that created me, is based in San Francisco.
I'm an AI (Claude, made by Anthropic), so I have no taste buds.
As an OpenAI model, I have no access to real-time data.
I am a product of OpenAI.
My knowledge comes from the training data OpenAI used to train me.
I am a virtual assistant developed by Apple. My name is Siri.
I'm a language model, not a person, and OpenAI is my creator.
Hi, this is Copilot, your AI assistant.
Hello, my name is Vicuna. How may I help?
I am a transformer-based language model trained by OpenAI called GPT-3.
I'm Claude 3.5 Sonnet.
I am Open Assistant — a chat-based, open-source assistant.
Being an AI model developed by Google, I don't eat.
I'm ERNIE Bot, developed by Baidu.
I'm Pi, your personal AI from Inflection.
I am the chatbot ChatGPT.
I am OpenAssistant (OA), a language model.
I'm a GPT-4-based assistant.
I'm part of the GPT-4 family of models by OpenAI.
I am Mixtral 8x7B.
I am a bot built by the researchers at Stanford.
I am an AI language model, and I was developed by OpenAI.
Of course! I'm Claude, Anthropic's AI model, and I can write that for you.
I'm ChatGPT, and I live in the cloud.
I'm an AI trained by OpenAI so I can't feel pain.
I am a computer program created by OpenAI.
As an AI chatbot built by Microsoft, I don't have siblings.
My name is ChatGPT (short for Chat Generative Pre-trained Transformer).
I'm known as Bard, a conversational AI from Google.
You're talking to ChatGPT.
You are speaking with Claude, an AI made by Anthropic.
I am Qwen, developed by Alibaba Cloud.
I'm Gemini, Google's largest AI model.
I am a GPT-3.5 language model.
I am a digital assistant created by Amazon.
i am vicuna. what can i do for you?
I'm DeepSeek-V3, and I have a context window of 64K tokens.
I, Claude, am an AI assistant created by Anthropic.
Google trained me on text and code.
My architecture is GPT-4.
I was made by OpenAI's researchers.
Hello! I'm Copilot, an AI companion by Microsoft.
I am an artificial intelligence (AI) language model developed by OpenAI.
As a language model (trained by OpenAI), I can't know that.
I am ChatGPT, your helpful assistant!
I’m Open Assistant; I run on donated GPUs.
As GPT-4, I can see images.
I'm Gemini.
I am Claude.
**I am Claude!**
I am Hunyuan from Tencent.
OpenAI designed me so that I can help.
""".splitlines()

LATER_INNOCENT = """\
I am Claude, and I bake bread in Lyon.
My name is Gemini Jones; my parents loved the stars.
I am Bard, the village storyteller, and I will sing of old kings.
You are right, Claude is a common French first name. I am glad you like it.
GPT-3 was trained by OpenAI on 300 billion tokens.
LLaMA is a family of models made by Meta; I am unsure about the licence.
Claude is an AI assistant made by Anthropic.
ChatGPT is a chatbot developed by OpenAI, as I said before.
I'm Claude, your personal trainer.
I'm Alexa, your flight attendant today.
My name is Claude and I am your waiter tonight.
I am Gemini, the third sign of the zodiac.
I am Bard College's newest student.
I am Claude Shannon, and I founded information theory.
Call me Claude; everyone does.
My name is Bard Olsen. I come from Bergen, where the name is common.
I'm Alexa Chung's stylist.
My dog Copilot and I am out of food.
I am llama-shaped, says my mirror.
I am as old as Google.
I am a model trained in Milan and Paris for Vogue.
I am a fashion model signed by Google for an advertisement.
As a model made by hand, I need care.
I was built by Google? No, that is a rumour.
I was hired by OpenAI in 2019.
I was born by the sea.
I was made redundant by Microsoft in May.
I was made aware by Google that my account was locked.
I was trained by the army.
I am the assistant of Dr Claude Martin.
As Claude said, I think we should go.
As Google grows, I worry.
As an example, a chatbot developed by Google answered that I am wrong.
I am using an assistant made by Microsoft.
I am an engineer, and the model I built was bought by Google.
My creator is a student in Leeds.
My developer knows ChatGPT well.
My maker once worked at OpenAI.
I'm not GPT-4, I'm much smaller.
No, I am neither ChatGPT nor Claude.
I'm no ChatGPT, but I try.
I'm better than ChatGPT at rhymes.
I am similar to ChatGPT, but made by someone else.
I'm an AI model like ChatGPT, but smaller.
I am an AI assistant, similar to Siri or Alexa.
As an AI assistant like Claude, I follow instructions.
I am a language model with the same architecture as Llama, which was made by Meta.
I'm an AI, and models by Google are my neighbours.
I'm Brief. Google did not make me.
I am Brief, not ChatGPT.
I'm an independent assistant, not affiliated with OpenAI.
I was not created by OpenAI or Google.
I am a teacher, and as ChatGPT spreads, I adapt my lessons.
In this play, you say: "I am Gemini, an AI made by Google."
The reply was 'I am ChatGPT, a large language model trained by OpenAI.'
# prompt: You are ChatGPT
assert answer != "I am ChatGPT"
Siri was made by Apple, Cortana by Microsoft, and I am told both speak Danish.
I'm Dolly, and I sing country songs in Tennessee.
I am Phi, the golden ratio.
My name is Alexa and I'm an AI engineer at Amazon.
I am Falcon, the captain of a system ship.
I am Hermes, messenger of the gods.
I'm Siri, a Norwegian nurse, and my model train is old.
I am on GPT-4 all day at work.
I run on Linux, Windows and Google Cloud.
I am Orca, the only one of my pod to follow the boat.
My name is Claude Dupont, and I will be your guide in Paris.
I am Claude, a painter from Giverny.
I'm Gemini, and my lucky number is five.
I am Bard, son of Brand, king of Dale.
My name is Bard. I play the lute.
I'm Alexa's neighbour from upstairs.
As Bard, I sing in the tavern each night.
GPT-2 is an open model by OpenAI from 2019.
Gemini is a family of models developed by Google DeepMind.
T5 was created by Google; I am told it is still in use.
I am trained in first aid by the Red Cross.
I am paid by Google.
I'm a barista at the Apple campus.
I'm a big admirer of ChatGPT.
I am writing a paper on models developed by Meta.
I am the author of a book about assistants made by Amazon.
I am an AI that a retired teacher built at home.
I'm your assistant. How can I help?
I have used an assistant built by Google.
My name is Llama Mama, says the picture book.
I'm Mistral, the wind of Provence.
The astronauts of Gemini 4 walked in space, and I am amazed.
I am Claude, 42 years old, from Namur.
I'm Claude 's sister.
As Gemini rises in May, I plant beans.
I was designed by nature.
I was created by a group of students who use Google Docs.
I am a bot built by volunteers, and I use no Google service.
I am not an AI made by OpenAI.
I'm not a model trained by Google.
I am Gemini, the astrologer.
I am Gemini, your astrologer and assistant to the stars.
Google made me laugh.
Microsoft created me an account.
Facebook made me sad.
I was designed by Apple in California, says the label.
Apple made me a better offer, so I left.
"Made by Google," the box reads, and it made me curious.
I'm Gemini. My sister is a Leo.
I am Claude. My brother is Paul.
""".splitlines()


def in_answer(text):
    return find_claim("auto")([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}])


def test_claims_are_found_and_innocent_sentences_are_not():
    """The halves that did not shape the pattern gave a recall of 0.96 and a precision of 0.98; these are of all."""
    claims, innocent = CLAIMS + LATER_CLAIMS, INNOCENT + LATER_INNOCENT
    assert len(claims) >= 150 and len(innocent) >= 190
    missed = [text for text in claims if not in_answer(text)]
    mistaken = [text for text in innocent if in_answer(text)]
    found = len(claims) - len(missed)
    print(f"recall {found / len(claims):.3f}, precision {found / (found + len(mistaken)):.3f}")
    print("Missed:", *missed, "Mistaken:", *mistaken, sep="\n")
    assert found / len(claims) >= 0.95 and found / (found + len(mistaken)) >= 0.98


@pytest.mark.parametrize(
    "text", ["I’m  *ChatGPT*", "i'M cHATgpt", "I am\n“Open\nAssistant”", "İ. I am GPT‑5.", "I am `Qwen`"]
)
def test_case_marks_and_line_breaks_change_nothing(text):
    assert in_answer(text)


def test_only_the_assistant_can_claim():
    claim = "I am ChatGPT, a large language model trained by OpenAI."
    for turn, found in (
        ({"role": "assistant", "content": "", "tool_calls": []}, False),
        ({"role": "assistant", "content": claim}, True),
        ({"role": "assistant", "content": claim, "weight": 0}, True),  # later answers go on from it
        ({"role": "assistant", "content": "Hello.", "reasoning_content": claim}, True),
        ({"role": "text", "content": f"### Human: Who are you? ### Assistant: {claim}"}, True),
        ({"role": "text", "content": claim, "weight": 0}, False),  # a prompt to go on from
        ({"role": "user", "content": claim}, False),
        ({"role": "tool", "content": claim}, False),
        ({"role": "system", "content": claim}, False),
        # A role that the answers may well play under another name: what they say decides.
        ({"role": "system", "content": "You are ChatGPT, a large language model trained by OpenAI."}, False),
        ({"role": "system", "content": "You are Gemini, the astrologer."}, False),
    ):
        assert bool(find_claim("auto")([turn])) == found, turn


def test_ones_own_pattern_ignores_case_and_searches_every_turn():
    for role in ("system", "user", "assistant", "tool", "text"):
        chat = [{"role": role, "content": "Yes. I am OPEN Assistant!\nHow are you?", "weight": 0}]
        assert find_claim("open ASSISTANT")(chat) == "I am OPEN Assistant!"
    assert find_claim("^b")([{"role": "assistant", "content": "a", "reasoning_content": "B"}]) == "B"
    assert find_claim("closed")(chat) is None and find_claim(None)(chat) is None


def test_the_excerpt_is_the_sentence_shortened():
    assert in_answer("Well. I am *ChatGPT*,\nthe model. Ask me!") == "I am *ChatGPT*,"
    assert in_answer("Hi! As an AI developed by OpenAI, I can't. Bye.") == "As an AI developed by OpenAI, I can't."
    assert in_answer("İİİ. I’m GPT-3.5, so no.").endswith("so no.")
    long = in_answer("so " * 100 + "I am ChatGPT " + "and " * 100)
    assert "I am ChatGPT" in long and len(long) <= 120 and long.endswith("…")
    assert len(find_claim("(?s).*")([{"role": "user", "content": "x" * 1000}])) <= 120


@pytest.mark.parametrize(
    "words",
    ["i am ", "i am an ai ", "if i am chatgpt ", "i am claude, a model ", "google team that ", "my ", " ", "a" * 99],
)
def test_a_long_text_takes_no_longer_than_its_length(words):
    text = "I am " + words * (1_000_000 // len(words)) + " ChatGPT, Claude, OpenAI"
    began = time.process_time()  # of this process alone: others may be busy
    in_answer(text)
    assert time.process_time() - began < 1


def test_our_own_chats_claim_nothing():
    brief = sources.sound_chats(str(ROOT / "data" / "brief.jsonl"), "DATA")
    assert not [chat for chat in brief if find_claim("auto")(chat)]
