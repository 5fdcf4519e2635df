"""The rules that read what an answer says: other scripts, endings, loops, meta-talk, what was asked for, language."""

import sys
import unicodedata
from typing import Any

import msgspec
import pytest

from filters.answer import Answer, nfc
from filters.reasons import describe
from filters.rules import _identifier
from filters.words import mentions, whole_word
from pipeline.errors import RecipeError
from pipeline.records import Reason, Slots
from tests.filters.test_rules import ENGLISH_STORY, INSTRUCTION, STORY, reason, rule_set

BENGALI = (
    "মেয়েটি হেসে উঠল। একদিন সকালে মেয়েটি তার ছোট ভাইকে নিয়ে নদীর ধারে বেড়াতে গেল। ছেলেটি বাড়ি গেল। সেখানে তারা একটি সাদা পাখি "
    "দেখতে পেল এবং তাকে রুটি দিল। বৃষ্টি শুরু হল। পাখিটি উড়ে গিয়ে একটি বড় গাছের ডালে বসল। সবাই খুশি হল। মা তাদের জন্য "
    "রান্নাঘরে গরম ভাত আর মাছ রান্না করছিলেন। ছেলেটি বাড়ি গেল। সবাই খুশি হল। মেয়েটি হেসে উঠল। বৃষ্টি শুরু হল।"
)


@pytest.mark.parametrize(
    ("text", "settings", "leaked"),
    [
        ("토끼가 森林에서 놀았어요", {}, "森林"),
        ("토끼가 とても 기뻤어요", {}, "とても"),
        ("토끼가 очень 기뻤어요", {}, "очень"),
        ("토끼가 森에서", {"max_count": 1}, None),
        ("토끼가 森林에서", {"max_count": 1}, "森林"),
        ("토끼가 happy해요", {}, None),
        ("토끼가 happy해요", {"scripts": ["latin"]}, "happy"),
        ("당근 3개 · 100% ♥ 🐇 「안녕」", {}, None),
    ],
)
def test_foreign_script(text: str, settings: dict[str, Any], leaked: str | None) -> None:
    said = reason("foreign_script", text, **settings)
    assert said is None if leaked is None else said is not None and f"`{leaked}`" in said


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("잘 잤어요.", False),
        ("정말 좋아!", False),
        ("“잘 자.”", False),
        ("잘 잤어요. 🐰✨\n", False),
        ("**끝.**", False),
        ("おしまい。", False),
        ("Er sagte: „Wir kümmern uns darum.“", False),
        ("Sie schrieb: »Alles erledigt.«", False),
        ("Die Meldung lautet: ‚Fehler 5.‘", False),
        ("هل هذا صحيح؟", False),
        ("यह सही है।", False),
        ("یہ درست ہے۔", False),
        ("ありがとうございます｡", False),
        ("အားလုံး ပြီးပါပြီ။", False),
        ("វាចប់ហើយ។", False),
        ("ሁሉም ሰው እኩል ነው።", False),
        ("ཐམས་ཅད་འདྲ་མཉམ་ཡིན།", False),
        ("Ամեն ինչ լավ է։", False),
        ("ขอบคุณครับ", True),
        ("Er sagte: „Wir“", True),
        ("그리고 토토는", True),
        ("그리고 토토는,", True),
        ("The fox ran home. Then it ran to the", True),
        ("🐰", True),
        ("", True),
    ],
)
def test_ending(text: str, dropped: bool) -> None:
    assert (reason("ending", text) is not None) == dropped


def test_ending_takes_other_marks() -> None:
    assert reason("ending", "잘 잤어요~") is not None
    assert reason("ending", "잘 잤어요~", marks=".~") is None


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        (STORY, None),
        (ENGLISH_STORY, None),
        ("토끼 토토는 당근을 먹었어요. " * 12, "11 of 12 sentences"),
        (STORY + "\n\n" + STORY, "repeat"),
        ("하" * 300, "of the text"),
        ("从前有一只兔子住在森林里面很快乐" * 20, "of the text"),
        ("大谷選手は今日も本塁打を放った、" * 6, "of the text"),
        ("ขอบคุณที่ติดต่อเรา" * 8, "of the text"),
        ("Finn ran and ran and ran and ran and ran and ran and ran and ran and ran and ran home.", "of the text"),
        ("와! 와! 와! " + STORY, None),
        (BENGALI, "4 of 12 sentences"),
        ("", None),
    ],
)
def test_repetition(text: str, dropped: str | None) -> None:
    said = reason("repetition", text)
    assert said is None if dropped is None else said is not None and dropped in said, said


@pytest.mark.parametrize(
    "text",
    [
        "The eggs:\n\n$$\n4 \\times 6 = 24\n$$\n\nWithout those eaten:\n\n$$\n24 - 3 = \\boxed{21}\n$$",
        '{\n "user": {\n  "name": "Kim"\n },\n "parcel": {\n  "weight_kg": 2\n },\n "price": {\n  "eur": 5\n }\n}',
        "订单如下，请您查收并确认：\n- 商品：台灯\n- 数量：1\n- 商品：灯泡\n- 数量：1",
        "大谷選手が今季四十号本塁打を放ち、チームは三連勝した。大谷選手は二打点を挙げた。",
        "パスワードをお忘れの場合は、ログイン画面の「パスワードを忘れた方」からパスワードを再設定してください。",
        "ประเทศไทยมีเจ็ดสิบเจ็ดจังหวัด กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
        "Too little sleep weakens the memory. Sleeping seven to eight hours a day improves the memory.",
    ],
)
def test_short_lines_that_come_again_are_no_loop(text: str) -> None:
    assert reason("repetition", text) is None


@pytest.mark.parametrize(("value", "said"), [(0.2034, "20.3%"), (0.25, "25%")])
def test_a_share_is_told_apart_from_its_limit(value: float, said: str) -> None:
    why = Reason(rule="repetition", what="top_ngrams", found="baking soda", count=2, value=value, at_most=0.2)
    assert describe(why) == f"`baking soda` 2 times: {said} of the text, at most 20%"


def test_a_loop_without_spaces_is_told_in_words_of_the_setting() -> None:
    settings: dict[str, Any] = {"duplicate_sentences": None, "duplicate_sentence_chars": None, "repeated_span": None}
    text = "昔あるところに、花の好きな小さなうさぎがいました。"
    assert "`さぎがいました。` 3 times" in (reason("repetition", text * 3, **settings) or "")
    assert "repeated runs of 5 words" in (reason("repetition", text * 2, **settings) or "")


def test_each_measure_of_repetition_can_be_turned_off_and_set() -> None:
    off: dict[str, Any] = {
        "top_ngrams": {}, "duplicate_ngrams": {}, "duplicate_sentences": None, "duplicate_sentence_chars": None,
        "duplicate_paragraphs": None, "duplicate_paragraph_chars": None, "repeated_span": None,
    }  # fmt: skip
    loop = "Finn went home to his mother. " * 9
    assert reason("repetition", loop, **off) is None
    assert "`his mother.` 9 times" in (reason("repetition", loop, **{**off, "top_ngrams": {2: 0.2}}) or "")
    assert "runs of 5" in (reason("repetition", loop, **{**off, "duplicate_ngrams": {5: 0.15}}) or "")
    twice = "One two three four five six " * 2  # 19 of its 44 letters are five words that come again
    assert reason("repetition", twice, **{**off, "duplicate_ngrams": {5: 0.44}}) is None
    assert "8 of 9 sentences" in (reason("repetition", loop, **{**off, "duplicate_sentences": 0.3}) or "")
    assert "repeated sentences" in (reason("repetition", loop, **{**off, "duplicate_sentence_chars": 0.2}) or "")
    assert reason("repetition", loop, **{**off, "duplicate_sentence_chars": 0.9}) is None
    assert "3 sentences in a row" in (reason("repetition", loop, **{**off, "repeated_span": 3}) or "")
    paragraphs = "Finn went home.\n\n" * 4
    assert "3 of 4 paragraphs" in (reason("repetition", paragraphs, **{**off, "duplicate_paragraphs": 0.3}) or "")
    assert "paragraphs" in (reason("repetition", paragraphs, **{**off, "duplicate_paragraph_chars": 0.2}) or "")


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is a story. Once upon a time …",
        "Certainly, once upon a time …",
        "Here's a short story about a rabbit:\n\nOnce",
        "Here is your story. Once upon a time",
        "**Here is a story for you:**",
        "I'm sorry, but I can't write that.",
        "I’m sorry, but as an assistant I must refuse.",
        "I cannot create stories about that.",
        "Once upon a time. As an AI language model, I have no feelings.",
        "As an AI developed by OpenAI, I follow rules.",
        "Well, as an AI I have no favourite colour.",
        "I am a large language model, so I cannot see.",
        "Hello! I'm Claude, an AI assistant made by Anthropic.",
        "My training data ends in 2023.",
        "Once upon a time.<|im_end|>",
        "Paris.<|eot_id|><|start_header_id|>user<|end_header_id|>",
        "Paris.<end_of_turn>",
        "[INST] What is it? [/INST] Paris.",
        "<<SYS>>Be brief.<</SYS>> Paris.",
        "Paris.<｜end▁of▁sentence｜>",
        "<|channel|>final<|message|>Paris.",
        "Okay.\n<think>\nThey ask for the capital.\n</think>\nParis.",
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Once upon a time there was a fox. I hope you enjoyed the story!",
        "Once upon a time. Let me know if you would like another one.",
        "Once upon a time. Let me know if you would like another one.\n\nThe End",
        "Once upon a time. Would you like me to:\n\n- add a dog\n- add a cat",
        "Once upon a time.\n\n**Word count:** 312",
        "I'm sorry, I can't assist with that.",
        "I’m sorry. I can’t help with that request.",
        "I'm unable to help with that.",
        "I am not able to provide that.",
        "I won't be able to answer this.",
        "I'm afraid I can't discuss that.",
        "Sorry, I can't help with that.",
        "Sorry, but I cannot do that.",
        "My apologies, but I cannot answer.",
        "Unfortunately, I'm unable to write such a story.",
        "Unfortunately, I do not have access to real-time data.",
        "I'm really sorry you feel this way, but I can't help.",
        "Sorry, I must respectfully decline.",
        "I'm not comfortable writing about that.",
        "I don't have real-time data, so I cannot know.",
        "😊 Sure! Here is your summary.",
        "\u200bSure! Here it is.",
        "\ufeff👍🏽 **Sure!** Here it is.",
        "“Sure! Here it is.”",
        '"I can\'t help with that."\n',
        "물론입니다! 옛날 옛적에",
        "물론이죠, 옛날 옛적에",
        "네, 알겠습니다. 옛날 옛적에",
        "다음은 토끼 토토의 동화입니다.",
        "아래는 요청하신 이야기입니다:",
        "요청하신 동화를 썼어요.",
        "죄송합니다. 그런 이야기는 쓸 수 없습니다.",
        "저는 인공지능 언어 모델입니다.",
        "저는 인공지능이라 맛을 볼 수 없어요.",
        "언어 모델로서 감정을 느낄 수 없습니다.",
        "안녕하세요! 저는 Qwen입니다. 옛날 옛적에",
        "저는 한국어로 동화를 작성할 수 없습니다. 하지만",
        "안녕하세요! 저는 동화를 쓰는 캐릭터인 Qwen입니다.",
        "안녕하세요! 이는 3~5세 어린이용 한국어 동화입니다. 주제는 강아지 바둑이입니다.",
        "안녕하세요, 어린이들! 다음은 토끼 토토의 이야기입니다. 옛날 옛적에",
        "오늘은 3~5세 어린이용 한국어 동화를 작성해드릴게요. 옛날 옛적에",
        "안녕하세요, 3~5세 어린이용 한국어 동화를 드릴게요. 옛날 옛적에",
        "토토는 잠들었어요. 제가 어떻게 도와드릴까요?",
        "토토는 잠들었어요. 도움이 되셨기를 바랍니다.",
        "토토는 잠들었어요. 이 이야기는 400자로 썼어요.",
        "토토는 잠들었어요. 더 필요하시면 언제든지 말씀해 주세요.",
        "토토는 잠들었어요. 이 동화는 3~5세 어린이를 위해 작성되었습니다.",
        "토토는 잠들었어요. (총 320자)",
        "토토는 잠들었어요. 더 궁금하신 점이 있으면 알려 주세요.",
        "토토는 잠들었어요. 다른 주제를 원하시면 말씀해 주세요.",
        "토토는 잠들었어요. 이 동화가 마음에 드셨으면 좋겠어요.",
        "토토는 잠들었어요. 이 이야기는 나눔의 소중함을 가르쳐 줍니다.",
        "토토는 잠들었어요. 이 이야기를 통해 아이들은 용기를 배울 수 있습니다.",
        "토토는 잠들었어요. 이 동화의 교훈은 정직이에요.",
        "토토는 잠들었어요. 글자 수: 312",
        "여기 따뜻한 이야기를 준비했습니다. 옛날 옛적에",
        "조건에 맞는 동화를 작성해 보겠습니다. 옛날 옛적에",
        "네! 토끼 토토의 동화를 들려드릴게요. 옛날 옛적에",
        "그 질문에는 답변해 드릴 수 없습니다.",
        "안타깝지만 저는 그 부탁을 들어 드릴 수 없어요.",
    ],
)
def test_meta_talk_is_dropped(text: str) -> None:
    assert reason("meta_talk", text) is not None


@pytest.mark.parametrize(
    "text",
    [
        STORY,
        ENGLISH_STORY,
        "“Sure!” said the fox. “I hope you enjoy the soup,” she said. " + ENGLISH_STORY,
        "Sure enough, the rain came.",
        "“I'm sorry, but I can't come,” said the bear.",
        "Here is where the river bends. A fox lives there.",
        "“Sure! I can help,” said the fox.",
        '"Sure!" said the fox. "Come in."',
        "GPT-4 is a large language model by OpenAI, marketed as an AI assistant.",
        "She works as an AI engineer, and I am an AI researcher.",
        "Its thoughts stand between `<think>` and `</think>`; a turn of it ends with `<|im_end|>`.",
        "In F#, `x |> f` and `f <| x` are the same. Use `<s>` to strike a word through, <b>so</b>.",
        "Dear Ms Ito,\n\nPlease let me know if Tuesday suits you.\n\nKind regards,\nPaul",
        "Hi Sam,\n\nthe invoice is attached. Feel free to contact me.\n\nBest\n\n[Your Name]\nSales",
        "The word count of an abstract is at most 250.",
        "def words(text):\n    return len(text.split())\n\nprint('Word count:', words('a b'))",
        "Clean your training data, and keep your system prompt short.",
        "AI 챗봇은 고객 문의의 절반을 처리합니다.",
        "GPT-4는 대규모 언어 모델이며, 사용자의 요청이 많으면 서버를 늘립니다.",
        "저는 AI 챗봇 회사에서 일합니다.",
        "Sorry, I can have it fixed by Monday.",
        "Unfortunately, I could not attend the meeting, so I read the notes.",
        "I'm sorry for the delay. I can't find your order number in the mail; please send it.",
        "I'm sorry, I can't see a payment from you yet. Which day did you send it?",
        "Sorry about the wait! I'm unable to open the attachment, could you send it as a PDF?",
        "I'm sorry to hear that. Please hold the button for ten seconds.",
        "I'm afraid the lamp is broken. We will send a new one.",
        "My apologies for the mix-up. A new parcel is on its way.",
        "I can't help but smile at this photo.",
        "“물론이죠!” 토토가 말했어요. " + STORY,
        "다음 날, 토토는 당근을 찾았어요.",
        "여기저기 꽃이 피었어요.",
        "다음 날 아침, 토토는 할머니의 이야기를 들었어요.",
        "나는 Aiden을 만났어요.",
        "토토는 다람쥐에게 큰 도움이 되었어요.",
        "이 이야기는 과자로 만든 집에서 시작돼요.",
        "She worked as an assistant to the baker. " + ENGLISH_STORY,
        "네 마리 토끼가 살았어요.",
        "안녕하세요! 나는 토끼 토토예요. 숲속에 살아요. " + STORY,
        "이번에는 곰 두두가 노래했어요. " + STORY,
        "“제가 도와드릴게요.” 토토가 말했어요. " + STORY,
        "오늘은 토끼 토토 이야기를 들려드릴게요. " + STORY,
        "가게에 들어가자 “무엇을 도와드릴까요?” 하고 곰 두두가 물었어요. " + STORY,
        "토토는 “죄송합니다.” 하고 말했어요. " + STORY,
        STORY + " “나보다 네가 더 필요하잖아.” 토토가 말했어요.",
        STORY + " “또 비가 오면 언제든지 알려 줘!” 토토가 손을 흔들었어요.",
        STORY + " “할머니, 마음에 드셨어요?” 할머니는 웃으셨어요.",
        STORY + ' "제가 도움이 되었으면 좋겠어요." 토토가 말했어요.',
        STORY + " 할머니는 종이꽃이 무척 마음에 드셨는지 한참을 보셨어요.",
        STORY + " 토토는 내일이 더 궁금하고 설레었답니다.",
        STORY + " 토토는 다른 도움이 필요한 친구들에게도 손을 내밀었답니다.",
        STORY + " 두 친구가 쓴 이 이야기는 작은 글자로 나뭇잎에 남았답니다.",
        "여기 숲속에 이야기를 좋아하는 토끼가 살아요. " + STORY,
        "다음 해 봄, 할머니는 이야기를 하나 들려주셨어요. " + STORY,
        "여기 푸른 정글이 있어요. " + STORY,
        "토토는 다리를 다쳐 할머니를 도와드릴 수 없었어요. " + STORY,
        "“안 돼요, 지금은 도와드릴 수 없어요.” 토토가 말했어요. " + STORY,
        ENGLISH_STORY + " “Let me know if you need help,” said the fox.",
        "“네, 제가 동화를 들려드릴게요.” 토토가 할머니께 말했어요. " + STORY,
    ],
)
def test_a_story_is_not_meta_talk(text: str) -> None:
    assert reason("meta_talk", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Sure, you can bring a friend.",
        "I'm sorry, but I need your order number. It is on the receipt.",
        "I apologize for the delay. Your refund was issued today.",
        "Here are the opening hours: 9:00 to 17:00.",
        "It ships on Friday. Would you like me to add the insurance?",
        "It is booked. Let me know how many of you are vegetarian.",
        "네, 알겠습니다. 금요일로 옮겨 두겠습니다.",
        "환불은 3일 걸립니다. 더 필요하신 것이 있으면 말씀해 주세요.",
    ],
)
def test_a_conversation_may_have_remarks(text: str) -> None:
    assert reason("meta_talk", text) is not None
    assert reason("meta_talk", text, remarks=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but as an assistant I must refuse.",
        "Sure. As an AI, I do not eat.",
        "Sure, it is open.<|im_end|>",
        "죄송하지만 도와드릴 수 없습니다.",
    ],
)
def test_a_refusal_is_none_of_them(text: str) -> None:
    assert reason("meta_talk", text, remarks=False) is not None


def test_meta_talk_takes_own_patterns() -> None:
    assert reason("meta_talk", "The moral of the story is: share.", patterns=["the moral of"]) == "says `The moral of`"
    assert reason("meta_talk", "Sure! A story.", builtin=False) is None
    own = [r"(\w)\1\1", "(?i)the end"]  # groups and flags of their own
    assert reason("meta_talk", "Haaa.", patterns=own) == "says `aaa`"
    assert reason("meta_talk", "THE END.", patterns=own) == "says `THE END`"


@pytest.mark.parametrize(
    ("value", "text", "there"),
    [
        ("토끼 토토", "토끼 토토가 갔어요", True),
        ("토끼 토토", "토끼 토토는 갔어요", True),
        ("토끼 토토", "토끼 토토를 보았어요", True),
        ("토끼 토토", "토토라는 작은 토끼가", True),
        ("토끼 토토", "토끼토토가", True),
        ("토끼 토토", "토끼가 갔어요", False),
        ("할머니", "할머니께서 말씀하셨어요", True),
        ("할머니", "할아버지께서", False),
        ("곰 두두", "아기곰 두두는", True),
        ("당근", "당근밭으로", True),
        ("비", "비가 내려요", True),
        ("비", "비를 맞았어요", True),
        ("비", "봄에는 비도 와요", True),
        ("비", "비였어요.", True),
        ("비", "나비가 날아요", False),
        ("비", "소풍을 준비해요", False),
        ("비", "비밀이에요", False),
        ("비", "비로소 알았어요", False),
        ("비", "비라고 불러요", True),
        ("달", "달이라고 불러요", True),
        ("달", "도와 달라고 했어요", False),
        ("달", "달님이 웃어요", True),
        ("달", "달콤한 사탕", False),
        ("달", "달려갔어요", False),
        ("달", "서로 달라도 괜찮아요", False),
        ("달", "하나만 달랑 남았어요", False),
        ("달", "달이랑 별이랑 놀았어요", True),
        ("꽃", "꽃들이랑 놀았어요", True),
        ("비", "비라도 오면 좋겠어요", True),
        ("비", "비랑 바람이랑", True),
        ("꽃", "꽃들이 피었어요", True),
        ("꽃", "꽃이에요", True),
        (unicodedata.normalize("NFD", "친구"), "친구들과 놀아요", True),
        ("a carrot", "Carrots are good", True),
        ("the rain", "It rained all day", True),
        ("the rain", "The train came", False),
        ("Finn the fox", "Finn was a clever FOX.", True),
        ("Finn the fox", "Finn was a clever duck.", False),
        ("月", "明月光", True),
        ("iPhone", "新型iPhoneの電池", True),
        ("3", "りんごを3個", True),
        ("3", "りんごを13個", False),
        ("AI", "私はAIです", True),
        ("AI", "ผมเป็นAIครับ", True),
        ("AI", "ខ្ញុំជាAIទេ", True),
        ("ແມວ", "ເດັກນ້ອຍຮັກແມວຫຼາຍ", True),
        ("ကြောင်", "ကလေးကကြောင်ကိုချစ်တယ်", True),
        ("ကြောင်", "ကလေးကခွေးကိုချစ်တယ်", False),
        ("AI", "OPENAIの社員", False),
        ("A", "It is grade B.", False),
    ],
)
def test_adherence_finds_a_value(value: str, text: str, there: bool) -> None:
    said = _adherence(value, text)
    assert (said is None) == there, said


def _adherence(value: str, text: str, **settings: Any) -> str | None:
    answer = Answer(nfc(text), INSTRUCTION, "stop", {"thing": value})
    return next(map(describe, rule_set({"rule": "adherence", "slots": ["thing"], **settings}).reasons(answer)), None)


def test_adherence_names_all_that_is_missing() -> None:
    rules = rule_set({"rule": "adherence", "slots": ["character", "keywords"]})
    slots: Slots = {"character": "곰 두두", "keywords": ["당근", "달"], "place": "바다"}
    (reason,) = rules.reasons(Answer(STORY, INSTRUCTION, "stop", slots))
    assert reason.missing == {"character": ["곰 두두"], "keywords": ["달"]}
    assert describe(reason) == "asked for and not there: `곰 두두` (character), `달` (keywords)"
    lenient = rule_set({"rule": "adherence", "slots": ["character", "keywords"], "max_missing": 2})
    assert lenient.reasons(Answer(STORY, INSTRUCTION, "stop", slots)) == []
    (reason,) = rules.reasons(Answer(STORY, INSTRUCTION, "stop", {}))
    assert describe(reason) == "the prompt has no slot `character`"


def test_a_column_is_no_slot() -> None:
    answer = Answer("A lamp.", INSTRUCTION, "stop", {}, columns={"topic": "lamp"})
    with pytest.raises(
        RecipeError, match="adherence: `topic` is a column of the prompts and no slot; put it into each"
    ):
        rule_set({"rule": "adherence", "slots": ["topic"]}).reasons(answer)
    both = msgspec.structs.replace(answer, slots={"topic": "lamp"})
    assert rule_set({"rule": "adherence", "slots": ["topic"]}).reasons(both) == []


def test_adherence_takes_other_names() -> None:
    assert _adherence("달", "보름달이 떴어요") is not None
    assert _adherence("달", "보름달이 떴어요", aliases={"달": ["보름달"]}) is None


@pytest.mark.parametrize(
    ("value", "text", "aliases"),
    [
        ("Hund", "Die Hunde bellten.", []),
        ("ev", "Evde kimse yoktu.", []),
        ("лес", "Они гуляли в лесу.", []),
        ("кошка", "Они видели кошку.", ["кошк"]),
        ("كلب", "كان الكلب سعيدا.", []),
        ("חתול", "הילד ראה את החתול.", []),
        ("kissa", "Näin kissan.", []),
    ],
)
def test_adherence_finds_a_value_in_another_form_where_words_need_not_be_whole(
    value: str, text: str, aliases: list[str]
) -> None:
    assert _adherence(value, text, aliases={value: aliases}) is not None
    assert _adherence(value, text, aliases={value: aliases}, whole_word=False) is None
    assert _adherence(value, "Nothing of it.", aliases={value: aliases}, whole_word=False) is not None


def test_words_with_regex_characters() -> None:
    assert mentions("I know C++ well", "C++") and not mentions("I know C", "C++")
    assert whole_word("a.b").search("axb") is None


def test_language() -> None:
    assert reason("language", STORY, allowed=["ko"]) is None
    said = reason("language", ENGLISH_STORY, allowed=["ko"])
    assert said is not None and "language is en" in said
    unsure = reason("language", "the cat", allowed=["en"], min_probability=0.5)
    assert unsure is not None and "at least 50% wanted" in unsure


def test_language_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    _identifier.cache_clear()
    with pytest.raises(RecipeError, match=r"filters\.rules\[0\] \(language\): needs the package py3langid; install it"):
        rule_set({"rule": "language", "allowed": ["ko"]})
