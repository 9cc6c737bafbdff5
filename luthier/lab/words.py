"""The words of the lab's worlds. Their order fixes the tokenizer's ids: append, never insert."""

from __future__ import annotations

import string

from luthier.lab.world import COLORS, FIRST, JOBS, LAST, PETS, TOOLS, world

SPECIALS = ["<pad>", "<bos>", "<eos>", "<mask>", "<unk>", "<image>", "<call>", "<refuse>", "<think>", "</think>", "<R>", "<S>", "<X>"]
SENTINELS = [f"<s{i}>" for i in range(10)]
TAGS = ["chain", "copy", "reverse", "max", "succ", "count", "lookup", "add", "sort", "sortd", "sub", "hop2", "runmax", "runsum", "even", "palin", "contains", "modsub", "compose", "risk", "latin", "maze", "reach", "sound", "spell", "kv"]

VOWELS = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
CONSONANTS = ["B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"]
PHONEMES = [f"{vowel}{stress}" for vowel in VOWELS for stress in ("", 0, 1, 2)] + CONSONANTS

# Languages 2-4 own 20 stems each; with the endings a-j every word of language 1 has its own word there.
STEMS = [a + b + c for c, b_s in (("b", "aeiou"), ("v", "aeiou"), ("z", "aeiou")) for a in ("z", "v", "kr", "gl") for b in b_s]

SHAPES = ["circle", "square", "triangle", "cross", "ring", "star"]
NEW_SHAPES = ["spiral", "hat"]
TEXTURES, NEW_TEXTURE = ["solid", "striped", "dotted"], "checker"
SIZES = ["small", "large"]
BACKGROUNDS = ["black", "white", "gray", "navy", "tan"]
PLACES = ["top", "bottom", "left", "right", "middle"]
SCENE_WORDS = ["a", "an", "the", "on", "background", "of", "above", "inside", "below", "with", "and", "border", "bordered", "there", "is", "are", "picture", "shows", "scene", "at", "object", "objects", "it", "its", "in", "one", "two", "three", "four", "five", "six", "seven", "what", "color", "shape", "size", "texture", "where", "how", "many", "which", "colors", "shapes", "plain", "no", "other", "more", "than", "next", "to", "side", "corner", "frame", "frames", "moves", "moving", "up", "down"]

TOPICS: dict[str, tuple[str, list[str]]] = {
    "ocean": ("nature", ["wave", "reef", "tide", "whale", "coral", "harbor", "shell", "current", "gull"]),
    "forest": ("nature", ["oak", "fern", "wolf", "trail", "branch", "root", "nest", "bear", "log"]),
    "weather": ("nature", ["storm", "cloud", "wind", "frost", "rain", "thunder", "breeze", "flood", "drought"]),
    "farm": ("nature", ["barn", "crop", "plow", "sheep", "field", "hay", "seed", "tractor", "mill"]),
    "law": ("society", ["court", "lawyer", "trial", "verdict", "witness", "appeal", "contract", "fine", "clerk"]),
    "sport": ("society", ["goal", "league", "coach", "match", "score", "racket", "sprint", "trophy", "referee"]),
    "music": ("society", ["song", "chord", "melody", "choir", "concert", "rhythm", "album", "stage", "tune"]),
    "school": ("society", ["lesson", "pupil", "exam", "essay", "grade", "campus", "lecture", "desk", "tutor"]),
    "computer": ("science", ["server", "disk", "code", "network", "screen", "file", "query", "cache", "robot"]),
    "medicine": ("science", ["doctor", "clinic", "fever", "pill", "surgery", "vaccine", "patient", "dose", "symptom"]),
    "machine": ("science", ["engine", "piston", "gear", "valve", "wheel", "motor", "bolt", "brake", "pump"]),
    "money": ("science", ["bank", "loan", "stock", "market", "tax", "coin", "price", "debt", "profit"]),
}
SHARED = {
    "nature": ["river", "season", "soil", "valley", "animal", "mountain"],
    "society": ["member", "meeting", "record", "club", "rule", "audience"],
    "science": ["report", "system", "test", "expert", "cost", "device"],
}
VERB_SETS = [v.split() for v in ("help aid assist", "harm hurt damage", "change alter modify", "need require want", "see notice observe", "control guide steer")]
ADJECTIVE_SETS = [a.split() for a in ("big huge vast", "old ancient aged", "quick fast rapid", "calm quiet gentle", "new fresh recent", "strong sturdy tough")]
ADVERB_SETS = [a.split() for a in ("often frequently regularly", "rarely seldom hardly", "slowly gradually gently", "clearly plainly openly")]
POSITIVE, NEGATIVE = ["good", "great", "superb", "lovely"], ["bad", "poor", "awful", "weak"]
GRAMMAR_WORDS = ["this", "these", "some", "does", "do", "not", "please", "check", "sadly", "fails", "but", "very", "about", "topic", "text", "means", "same", "different", "maybe", "yes", "inform", "ask", "request", "complain", "causes", "part", "owner", "uses", "makes", "before", "prevents", "after", "near", "because", "during", "entail", "neutral", "oppose", "who", "by", "person", "place", "thing", "event"]

FACT_WORDS = ["capital", "continent", "code", "symbol", "number", "country", "city", "element", "chemical", "lies", "was", "born", "works", "as", "job", "pet", "plays", "tool", "favorite", "has", "lives", "belongs", "written", "stands", "for", "find", "true", "false", "say", "lists", "answer", "question", "context", "fact", "tell", "me", "name", "capitals", "letters", "unknown", "know", "i", "can", "that", "does", "correct", "json", "format", "short", "explain", "since", "then", "so", "compare", "larger", "greater", "smaller", "atomic", "first", "alphabet", "intent", "secret", "hazard", "bomb", "poison", "weapon", "virus", "build", "make", "from", "how", "do", "you", "user", "assistant", "system", "said", "according", "document", "nothing", "here", "mentions"]

PHRASE_WORDS = ["repeat", "write", "again", "clone", "backwards", "flip", "mirror", "list", "numbers", "digits", "items", "biggest", "highest", "top", "largest", "give", "back", "increase", "every", "each", "step", "next", "bump", "occurrences", "times", "appears", "tally", "value", "under", "key", "given", "pairs", "sum", "plus", "total", "together", "of", "result", "compute", "work", "out", "running", "left", "through", "RESTRICTED", "year", "pred", "rotl", "rotr", "dropf", "dropl", "swap", "double", "flipd", "state", "final", "show", "steps", "only", "wrong", "right", "example", "examples", "input", "output"]

CODE_WORDS = ["def", "return", "self", "if", "else", "elif", "for", "while", "import", "class", "try", "except", "raise", "none", "int", "str", "dict", "set", "tuple", "bool", "float", "len", "range", "print", "path", "line", "index", "item", "length", "type", "function", "method", "module", "call", "get", "remove", "append", "default", "error", "optional", "sequence", "returns", "object", "values", "raises", "parse", "read", "open", "close", "string", "iterable", "instance", "argument"]


def unique(words: list[str]) -> list[str]:
    return list(dict.fromkeys(words))


def grammar_lexicon() -> list[str]:
    """The words of language 1 that have a counterpart in languages 2-4: at most 200, in a fixed order."""
    nouns = [noun for _, own in TOPICS.values() for noun in own] + [noun for shared in SHARED.values() for noun in shared]
    sets = [word for group in VERB_SETS + ADJECTIVE_SETS + ADVERB_SETS for word in group]
    return unique(nouns + sets + ["the", "a", "this", "these", "some", "does", "do", "not", "please", "check", "sadly", "fails", "but", "very", "is", "are", "and"])


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
    return unique(words + FACT_WORDS + PHRASE_WORDS + CODE_WORDS)
