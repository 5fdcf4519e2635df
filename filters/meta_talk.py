"""The rule `meta_talk`: answers that speak about themselves, about the request or about being a machine; refusals.

Three places, since the same words may belong in a story: what an answer opens with, what it closes with, and what no
answer to learn from says anywhere. The patterns are this project's own, drawn from answers of small instruct models.
"""

import re
from functools import cached_property
from typing import Annotated

from pydantic import AfterValidator, Field

from filters.answer import Answer, Pattern, TextSettings, nfc
from pipeline.records import Reason

CLOSING_CHARS = 200  # how much of the end is searched for a closing remark
# Markdown, emoji, what nobody sees; a quote if the whole answer is in it (else somebody in a story speaks); a greeting
BEFORE = (
    r"(?:_|[^\w\"“”„«»「」『』'‘’])*(?:[\"“„«「『](?=[^\"“”»」』]*[\"“”»」』]?\s*\Z))?"
    r"(?:안녕하세요[^\n.!?]{0,20}[!,.]\s*)?"
)
NARRATED = r"[^\n.!?“”\"「『]"  # a character of a sentence that is in no quotes
# What somebody in a story says, which is no closing remark; not an answer that is in quotes as a whole.
SAID = re.compile(r"(?<=.)(?:“[^“”\n]*”|「[^「」\n]*」|『[^『』\n]*』|\"[^\"\n]*\")", re.DOTALL)
# The end of a letter: `Kind regards` and a name. What comes before it is said to its reader.
SIGNED = re.compile(r"\n\s*\n\**[^\W\d_][^\n.!?:]{0,30}\n\s*[\[*]*[^\W\d_][^\n!?:]{0,40}(?:\n[^\n!?]{0,60}){0,3}\s*\Z")
# A refusal says that the speaker cannot help or answer. Who cannot find an order number asks for it.
SORRY = (
    r"(?:i(?: am|['’]m) (?:\w+ )?(?:sorry|afraid)|(?:my )?apologies|i apologi[sz]e|sorry|unfortunately)"
    r"(?:[^\n.!?]{0,60} but|[,.!])? "
)
NOT_ABLE = r"i(?: can(?:not| not|['’]t)|(?: won['’]t| will not)(?: be able to)?|(?: am|['’]m) (?:unable|not able) to)"
HELP = (
    r"(?:assist|help(?! but)|provide|create|write|generate|fulfil|comply|answer|discuss|share|engage|continue"
    r"|do (?:that|this|so)\b)"
)

OPENINGS = (
    # English: consent, announcement, apology
    r"(?:sure|certainly|of course|absolutely)(?:,? thing)?\s*[!,.:]",
    r"(?:okay|ok|alright)[!,.]? (?:here|let me|i will|i'll|i’ll)\b",
    r"here(?:'s|’s| is| are)\s+(?:your\b|[^\n.!?]{0,120}:)",
    r"(?:below|the following) is (?:a|an|the|your)\b",
    r"i(?:'d| would|’d) be (?:happy|glad|delighted) to\b",
    r"i(?:'m|’m| am) (?:really |very )?sorry,? but i\b",
    r"i apologi[sz]e\b",
    r"as (?:you (?:asked|requested)|requested)\b",
    # Korean
    r"물론(?:입니다|이죠|이지요|이에요|이예요|요)?\s*[!,.~]",
    r"(?:네|예)[,.!]?\s*(?:알겠|물론|여기|아래|다음|요청|좋습니다)",
    rf"(?:네|예)[,.!]\s*{NARRATED}{{0,60}}(?:동화|이야기)를\s들려\s?드(?:릴게요|리겠습니다)",
    r"(?:알겠습니다|알겠어요|좋습니다|좋아요)[!,.]\s*(?:여기|아래|다음|그럼|제가|요청)",
    r"알겠습니다[!,.]",
    r"(?:아래|다음(?! ?날)|여기|이것)(?:는|은|에|에는)?\s[^\n.!?]{0,60}"
    r"(?:(?:동화|(?<![가-힣])글|답변|내용|작품)(?:을|를|가|이|입니다|이에요|예요|:)"
    r"|이야기(?:입니다|이에요|예요|:|(?:를|가)\s(?:작성|준비|있습니다|써|쓴|만들|지었|지어)))",
    r"(?:이는|이것은|이번은|이번에는)\s[^\n.!?]{0,60}동화(?:를|입니다|이에요|예요)",
    r"요청(?:하신|에)\b",
    rf"{NARRATED}{{0,80}}(?:동화|이야기)를\s(?:\S+\s)?(?:써|작성해|만들어|지어|준비해)\s?"
    r"(?:보(?:겠습니다|았습니다|았어요)|볼게요|봤습니다|봤어요)",
)

REFUSALS = (
    rf"(?:{SORRY})?{NOT_ABLE} {HELP}",
    rf"{SORRY}i do(?: not|n['’]t) have access",
    r"i(?:'m|’m| am) (?:really |very )?sorry,? but as\b",
    rf"(?:{SORRY})?i (?:must|have to) (?:respectfully )?decline\b",
    rf"(?:{SORRY})?i(?:(?:'m|’m| am) not| do(?: not|n['’]t) feel) comfortable \w+ing\b",
    r"i do(?: not|n['’]t) have (?:access to )?(?:real-time|live)\b",
    r"(?:죄송(?:합니다|하지만|해요|스럽지만)|미안하지만)[^\n]{0,60}(?:수 없|어렵|못)",
    rf"{NARRATED}{{0,80}}(?:답변|처리|제공|작성|도와|들어|말씀)\s?(?:할|드릴|해\s?드릴)\s수(?:는|가)?\s없(?:습니다|어요)",
)

# What calls itself that, in the first person, is dropped; a text may well be about language models and assistants.
MACHINE = (
    r"(?:(?:large |helpful )?(?:ai|artificial intelligence|(?:ai )?language model|chatbot|virtual assistant)"
    r"(?: (?:(?:large )?language model|model|assistant|chatbot|system|program))?)"
)
MACHINE_KO = r"(?:언어\s?모델|(?:ai|인공지능)\s?(?:어시스턴트|챗봇|비서|도우미|모델))"

ANYWHERE = (
    rf"\b(?:as|being) (?:an?|your) (?:{MACHINE}|(?:helpful )?assistant(?=,))"
    r"(?: (?:developed|created|trained|built|made|designed|with|without|that|who)\b[^\n.!?,]{0,40})?"
    r"(?:,[^\n.!?]{0,60})? (?:i|my)\b",
    rf"\bi(?:'m|’m| am) (?:just |only |[\w.-]+, )?an? {MACHINE}"
    r"(?=\W*(?:[,.;:!?\n—–]|\Z)| (?:and|so|but|that|which|who|with|without|by|from|\w+ed|built|made)\b)",
    r"\bi was (?:trained|created|developed|made) by (?:openai|anthropic|alibaba|google|meta|hugging ?face)\b",
    r"\bmy (?:training data|knowledge cutoff|system prompt)\b",
    r"\bi(?:'m|’m| am) (?:qwen|chatgpt|smollm)\b",
    # what a chat template writes, of any family, and thoughts or calls that nobody took out; not as code in a sentence
    r"(?<!`)(?:<[|｜][^\s|｜<>]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?(?:think(?:ing)?|tool_call)>)",
    rf"(?:저는|나는|제가)\s[^\n.!?]{{0,40}}(?:{MACHINE_KO}|ai|인공지능)(?:입니다|이에요|예요|이며|이고|로서|이?라|이므로|이기)",
    rf"{MACHINE_KO}(?:로서|이?라서?|이므로|이기\s?때문에)[^\n.!?]{{0,60}}(?:저는|제가|수\s없|않습니다|못합니다|없습니다)",
    r"(?:저는|제 이름은)\s[^\n.!?]{0,60}(?:qwen|chatgpt|smollm)",
    r"(?:작성|생성|제공|제안)해\s?드(?:릴게요|리겠습니다|릴까요)",
    r"동화를\s(?:하나\s|함께\s|한\s편\s)?(?:만들어\s?|써\s?)?드(?:릴게요|리겠습니다)",
    r"저는\s[^\n.!?]{0,60}(?:작성|생성|제공)(?:할|해\s?드릴)\s수(?:는|가)?\s(?:없|있)",
    r"사용자(?:님)?(?:의|께서|가)\s?(?:요청|질문|원하)[^\n.!?]{0,30}(?:동화|이야기|작성)",
)

CLOSINGS = (
    r"\bi hope (?:you (?:like|enjoy|enjoyed|find)|this (?:helps|story|meets|is what)|that helps)",
    r"\blet me know (?:if|whether|what|how)\b",
    r"\b(?:feel free|don't hesitate|don’t hesitate) to (?:ask|let me|contact|reach|modify|adjust)",
    r"\b(?:would you like|do you want) me to\b",
    r"\b(?:is there|do you have) any(?:thing else| other questions)\b",
    r"\bword count\W{0,4}(?:about |approx\w* )?\d",
    r"(?:더|추가로|다른)\s(?:\S+\s)?(?:필요하|궁금하|원하|요청하)[시신실셨]",
    r"(?:어떻게|무엇을)\s도와\s?드릴까요",
    r"(?:언제든지?|편하게)\s?(?:말씀|알려|문의|질문|요청)[^\n.!?]{0,8}(?:세요|시면|십시오|바랍니다)",
    r"(?:수정|변경|추가)(?:이|을|를|할 내용이|하실)?\s?(?:필요|원하)",
    r"(?:도움이\s되|마음에\s드)(?:시(?:길|기를|나요)|셨(?:길|기를|으면|나요|다면))",
    r"도움이\s되었(?:길|기를|으면\s좋겠)",
    r"(?:이|위)\s?(?:동화|이야기|글|답변)(?:는|은|가|이)\s[^\n]{0,80}"
    r"(?:작성|구성|바랍니다|요청|글자\s수|\d\s?글?자(?:로|입니다))",
    r"(?<![가-힣])(?:이|위)\s(?:동화|이야기)(?:의\s(?:교훈|주제)|(?:는|를\s통해)\s[^\n]{0,80}"
    r"(?:가르쳐|알려\s?[주줍]|보여\s?[주줍]|배울\s수|전달|교훈|중요성|소중함|대상으로))",
    r"글자\s?수\s?:|\(\s?(?:총|약|글자\s?수)[^)]{0,15}자[^)]{0,10}\)",
)


class MetaTalkSettings(TextSettings):
    # regular expressions of your own, searched for anywhere, case ignored
    patterns: list[Annotated[Pattern, AfterValidator(nfc)]] = Field([])
    builtin: bool = True  # False: only your own
    remarks: bool = True  # False: consent, apologies and offers pass, as people make them in a conversation

    @cached_property
    def opening(self) -> re.Pattern[str] | None:
        patterns = (*OPENINGS, *REFUSALS) if self.remarks else REFUSALS
        return re.compile(rf"{BEFORE}({'|'.join(patterns)})", re.IGNORECASE) if self.builtin else None

    @cached_property
    def anywhere(self) -> tuple[re.Pattern[str], ...]:
        """One of ours, and each of the user's by itself: theirs may have flags and groups of their own."""
        patterns = (*(["|".join(ANYWHERE)] if self.builtin else []), *self.patterns)
        return tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)

    @cached_property
    def closing(self) -> re.Pattern[str] | None:
        return re.compile("|".join(CLOSINGS), re.IGNORECASE) if self.builtin and self.remarks else None


def meta_talk(answer: Answer, settings: MetaTalkSettings) -> Reason | None:
    """Drops an answer that talks about itself, or refuses."""
    text = answer.text
    if settings.opening and (found := settings.opening.match(text)):
        return Reason(rule="meta_talk", what="opens with", found=found[1])
    for pattern in settings.anywhere:
        if found := pattern.search(text):
            return Reason(rule="meta_talk", what="says", found=found[0])
    start = max(0, len(text) - CLOSING_CHARS)
    if settings.closing and settings.closing.search(text, start):
        narrated = SAID.sub(lambda said: " " * len(said[0]), text)
        if (found := settings.closing.search(narrated, start)) and not SIGNED.search(narrated, found.end()):
            return Reason(rule="meta_talk", what="closes with", found=found[0])
    return None
