"""The words of the lab's worlds. Their order fixes the tokenizer's ids: append, never insert."""

from __future__ import annotations

import string

from luthier.lab.world import COLORS, FIRST, JOBS, LAST, PETS, TOOLS, words, world

SPECIALS = words("<pad> <bos> <eos> <mask> <unk> <image> <call> <refuse> <think> </think> <R> <S> <X>")
SENTINELS = [f"<s{i}>" for i in range(10)]
TAGS = words("""chain copy reverse max succ count lookup add sort sortd sub hop2 runmax runsum even palin contains modsub
compose risk latin maze reach sound spell kv""")

VOWELS = words("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW")
CONSONANTS = words("B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH")
PHONEMES = [f"{vowel}{stress}" for vowel in VOWELS for stress in ("", 0, 1, 2)] + CONSONANTS

# Languages 2-4 own 20 stems each; with the endings a-j every word of language 1 has its own word there.
STEMS = [a + b + c for c, b_s in (("b", "aeiou"), ("v", "aeiou"), ("z", "aeiou")) for a in ("z", "v", "kr", "gl") for b in b_s]

SHAPES = words("circle square triangle cross ring star")
NEW_SHAPES = ["spiral", "hat"]
TEXTURES, NEW_TEXTURE = words("solid striped dotted"), "checker"
SIZES = ["small", "large"]
BACKGROUNDS = words("black white gray navy tan")
PLACES = words("top bottom left right middle")
SCENE_WORDS = words("""a an the on background of above inside below with and border bordered there is are picture shows scene at
object objects it in one two three four five six seven what color shape size texture where how many which
no than to frame moves""")

TOPICS: dict[str, tuple[str, list[str]]] = {
    "ocean": ("nature", words("wave reef tide whale coral harbor shell current gull")),
    "forest": ("nature", words("oak fern wolf trail branch root nest bear log")),
    "weather": ("nature", words("storm cloud wind frost rain thunder breeze flood drought")),
    "farm": ("nature", words("barn crop plow sheep field hay seed tractor mill")),
    "law": ("society", words("court lawyer trial verdict witness appeal contract fine clerk")),
    "sport": ("society", words("goal league coach match score racket sprint trophy referee")),
    "music": ("society", words("song chord melody choir concert rhythm album stage tune")),
    "school": ("society", words("lesson pupil exam essay grade campus lecture desk tutor")),
    "computer": ("science", words("server disk code network screen file query cache robot")),
    "medicine": ("science", words("doctor clinic fever pill surgery vaccine patient dose symptom")),
    "machine": ("science", words("engine piston gear valve wheel motor bolt brake pump")),
    "money": ("science", words("bank loan stock market tax coin price debt profit")),
}
SHARED = {
    "nature": words("river season soil valley animal mountain"),
    "society": words("member meeting record club rule audience"),
    "science": words("report system test expert cost device"),
}
VERB_SETS = [words(v) for v in ("help aid assist", "harm hurt damage", "change alter modify", "need require want", "see notice observe", "control guide steer")]
ADJECTIVE_SETS = [words(a) for a in ("big huge vast", "old ancient aged", "quick fast rapid", "calm quiet gentle", "new fresh recent", "strong sturdy tough")]
ADVERB_SETS = [words(a) for a in ("often frequently regularly", "rarely seldom hardly", "slowly gradually gently", "clearly plainly openly")]
POSITIVE, NEGATIVE = words("good great superb lovely"), words("bad poor awful weak")
GRAMMAR_WORDS = words("""this these some does do not please check sadly fails but very about topic text means same different maybe
yes inform ask request complain causes part owner uses makes before prevents after near because during
entail neutral oppose by""")

FACT_WORDS = words("""capital continent code symbol number country city element lies was born works as job pet plays tool
favorite has written for true false answer context tell me name capitals unknown that json since so
larger secret bomb poison make from you user assistant system nothing here""")

PHRASE_WORDS = words("""repeat again clone backwards flip mirror list numbers biggest highest give increase every each bump times
tally value key sum plus result compute work out RESTRICTED year pred rotl rotr dropf dropl swap double
comp wrong example hint""")

CODE_WORDS = words("""def return self if else import class raise none int str dict set len path line index item type function
default error object string""")

LATER_WORDS = words("short trace mode safe virus unsafe fast")


def unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))


def grammar_lexicon() -> list[str]:
    """The words of language 1 that have a counterpart in languages 2-4: at most 200, in a fixed order."""
    nouns = [noun for _, own in TOPICS.values() for noun in own] + [noun for shared in SHARED.values() for noun in shared]
    sets = [word for group in VERB_SETS + ADJECTIVE_SETS + ADVERB_SETS for word in group]
    return unique(nouns + sets + words("the a this these some does do not please check sadly fails but very is are and"))


def scene_lexicon() -> list[str]:
    return unique(SHAPES + NEW_SHAPES + COLORS + TEXTURES + [NEW_TEXTURE] + SIZES + BACKGROUNDS + PLACES + SCENE_WORDS)


def translate_word(word: str, language: int, lexicon: dict[str, int]) -> str:
    """The word of language 2-4 for a word of language 1 (a plural or verb ending -s is kept); others stay."""
    base = word if word in lexicon else word.removesuffix("s")
    if language == 1 or base not in lexicon:
        return word
    stem, ending = divmod(lexicon[base], 10)
    return STEMS[20 * (language - 2) + stem] + string.ascii_lowercase[ending] + word[len(base):]


def vocabulary() -> list[str]:
    """All fixed entries in order, before padding to 1,024."""
    facts = [w for name, about in world()["countries"].items() for w in (name, about["capital"], about["continent"])]
    printable = [c for c in string.printable if not c.isspace()]
    words = SPECIALS + SENTINELS + printable + [f"##{c}" for c in printable] + TAGS + PHONEMES + STEMS
    words += unique(facts) + list(world()["elements"]) + FIRST + LAST + JOBS + PETS + TOOLS + COLORS
    words += scene_lexicon() + list(TOPICS) + grammar_lexicon() + POSITIVE + NEGATIVE + GRAMMAR_WORDS
    return unique(words + FACT_WORDS + PHRASE_WORDS + CODE_WORDS + LATER_WORDS)
