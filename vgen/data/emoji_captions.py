"""Captions a person would type, from the Unicode names of emoji.

The names of the data are labels of characters, not descriptions of pictures: "HEAVY BLACK HEART" is red, "black" and "white"
often mean filled and outlined, keyboard and map symbols are named after their code charts. Three layers turn them into captions:

1. `PHRASES`: a table for the names that would mislead a reader of the picture;
2. `RULES`: a few patterns (families, hair, hands, coloured shapes, clock faces);
3. for everything else the name itself, in lower case and plain ASCII ("Côte d'Ivoire" -> "cote d'ivoire"),
   with flags turned around ("France Flag" -> "flag of france").
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# plain name -> caption
PHRASES = {
    # colours that are not the picture's colours
    "heavy black heart": "red heart",
    "black heart suit": "heart suit",
    "black spade suit": "spade suit",
    "black diamond suit": "diamond suit",
    "black club suit": "club suit",
    "black sun with rays": "sun",
    "white medium star": "star",
    "white smiling face": "smiling face",
    "black scissors": "scissors",
    "black nib": "fountain pen nib",
    "black telephone": "red telephone",
    "waving black flag": "black flag",
    "black question mark ornament": "red question mark",
    "white question mark ornament": "white question mark",
    "white exclamation mark ornament": "white exclamation mark",
    "heavy exclamation mark symbol": "red exclamation mark",
    "playing card black joker": "joker playing card",
    "white left pointing backhand index": "hand pointing left",
    "white right pointing backhand index": "hand pointing right",
    "white up pointing backhand index": "hand pointing up",
    "white down pointing backhand index": "hand pointing down",
    "white up pointing index": "index finger pointing up",
    # buttons and signs
    "black right-pointing triangle": "play button",
    "black left-pointing triangle": "reverse button",
    "black right-pointing double triangle": "fast forward button",
    "black left-pointing double triangle": "rewind button",
    "black up-pointing double triangle": "fast up button",
    "black down-pointing double triangle": "fast down button",
    "up-pointing small red triangle": "up button",
    "down-pointing small red triangle": "down button",
    "up-pointing red triangle": "red triangle pointing up",
    "down-pointing red triangle": "red triangle pointing down",
    "black rightwards arrow": "right arrow",
    "leftwards black arrow": "left arrow",
    "upwards black arrow": "up arrow",
    "downwards black arrow": "down arrow",
    "north east arrow": "up right arrow",
    "south east arrow": "down right arrow",
    "south west arrow": "down left arrow",
    "north west arrow": "up left arrow",
    "leftwards arrow with hook": "left arrow with hook",
    "rightwards arrow with hook": "right arrow with hook",
    "arrow pointing rightwards then curving upwards": "arrow curving up",
    "arrow pointing rightwards then curving downwards": "arrow curving down",
    "clockwise downwards and upwards open circle arrows": "clockwise arrows",
    "anticlockwise downwards and upwards open circle arrows": "counterclockwise arrows",
    "clockwise rightwards and leftwards open circle arrows": "repeat button",
    "clockwise rightwards and leftwards open circle arrows with circled one overlay": "repeat once button",
    "twisted rightwards arrows": "shuffle button",
    "back with leftwards arrow above": "back arrow",
    "end with leftwards arrow above": "end arrow",
    "on with exclamation mark with left right arrow above": "on arrow",
    "soon with rightwards arrow above": "soon arrow",
    "top with upwards arrow above": "top arrow",
    "heavy multiplication x": "multiplication sign",
    "heavy plus sign": "plus sign",
    "heavy minus sign": "minus sign",
    "heavy division sign": "division sign",
    "heavy equals sign": "equals sign",
    "heavy dollar sign": "dollar sign",
    "heavy large circle": "hollow red circle",
    "white heavy check mark": "check mark button",
    "heavy check mark": "check mark",
    "negative squared cross mark": "cross mark button",
    "eight pointed black star": "eight pointed star",
    "black universal recycling symbol": "recycling symbol",
    "input symbol for latin capital letters": "capital letters button",
    "input symbol for latin small letters": "small letters button",
    "input symbol for latin letters": "abc button",
    "input symbol for numbers": "numbers button",
    "input symbol for symbols": "symbols button",
    "negative squared latin capital letter a": "letter a button",
    "negative squared latin capital letter b": "letter b button",
    "negative squared latin capital letter o": "letter o button",
    "negative squared latin capital letter p": "parking button",
    "negative squared ab": "letters ab button",
    "circled latin capital letter m": "circled letter m",
    "information source": "information button",
    "squared up with exclamation mark": "up exclamation button",
    "hash key": "keycap hash",
    "keycap: *": "keycap asterisk",
    "squared katakana koko": "japanese here button",
    "squared katakana sa": "japanese service charge button",
    "squared cjk unified ideograph-6708": "japanese monthly amount button",
    "squared cjk unified ideograph-6709": "japanese not free of charge button",
    "squared cjk unified ideograph-6307": "japanese reserved button",
    "squared cjk unified ideograph-5272": "japanese discount button",
    "squared cjk unified ideograph-7121": "japanese free of charge button",
    "squared cjk unified ideograph-7981": "japanese prohibited button",
    "squared cjk unified ideograph-7533": "japanese application button",
    "squared cjk unified ideograph-5408": "japanese passing grade button",
    "squared cjk unified ideograph-7a7a": "japanese vacancy button",
    "squared cjk unified ideograph-55b6": "japanese open for business button",
    "squared cjk unified ideograph-6e80": "japanese no vacancy button",
    "circled ideograph advantage": "japanese bargain button",
    "circled ideograph accept": "japanese acceptable button",
    "circled ideograph congratulation": "japanese congratulations button",
    "circled ideograph secret": "japanese secret button",
    "automated teller machine": "atm sign",
    "water closet": "wc sign",
    "mens symbol": "men's room sign",
    "womens symbol": "women's room sign",
    "put litter in its place symbol": "litter in bin sign",
    "do not litter symbol": "no littering sign",
    "no one under eighteen symbol": "no one under eighteen sign",
    "no smoking symbol": "no smoking sign",
    "no entry sign": "prohibited sign",
    "no entry": "no entry sign",
    "potable water symbol": "potable water sign",
    "non-potable water symbol": "non-potable water sign",
    "octagonal sign": "stop sign",
    "no mobile phones": "no mobile phones sign",
    "no pedestrians": "no pedestrians sign",
    "no bicycles": "no bicycles sign",
    "children crossing": "children crossing sign",
    # faces, hands and people
    "extraterrestrial alien": "alien",
    "serious face with symbols covering mouth": "face with symbols on mouth",
    "shocked face with exploding head": "exploding head",
    "grinning face with one large and one small eye": "zany face",
    "face with finger covering closed lips": "shushing face",
    "face with open mouth vomiting": "vomiting face",
    "face with one eyebrow raised": "face with raised eyebrow",
    "face with uneven eyes and wavy mouth": "woozy face",
    "face with pleading eyes": "pleading face",
    "face with party horn and party hat": "partying face",
    "smiling face with smiling eyes and hand covering mouth": "smiling face with hand over mouth",
    "smiling face with smiling eyes and three hearts": "smiling face with three hearts",
    "smiling face with heart-shaped eyes": "smiling face with heart eyes",
    "smiling cat face with heart-shaped eyes": "smiling cat face with heart eyes",
    "reversed hand with middle finger extended": "middle finger",
    "raised hand with part between middle and ring fingers": "vulcan salute",
    "hand with index and middle fingers crossed": "crossed fingers",
    "fisted hand sign": "oncoming fist",
    "person raising both hands in celebration": "raising hands",
    "person with folded hands": "folded hands",
    "rightwards hand": "right hand",
    "leftwards hand": "left hand",
    "rightwards pushing hand": "right pushing hand",
    "leftwards pushing hand": "left pushing hand",
    "face with no good gesture": "person gesturing no",
    "face with ok gesture": "person gesturing ok",
    "information desk person": "person tipping hand",
    "happy person raising one hand": "person raising hand",
    "person with pouting face": "person pouting",
    "person bowing deeply": "person bowing",
    "face palm": "person facepalming",
    "shrug": "person shrugging",
    "adult": "person",
    "older adult": "older person",
    "pedestrian": "person walking",
    "runner": "person running",
    "dancer": "woman dancing",
    "standing person": "person standing",
    "kneeling person": "person kneeling",
    "face massage": "person getting massage",
    "haircut": "person getting haircut",
    "fencer": "person fencing",
    "horse racing": "jockey on horse",
    "surfer": "person surfing",
    "swimmer": "person swimming",
    "rowboat": "person rowing boat",
    "bicyclist": "person biking",
    "mountain bicyclist": "person mountain biking",
    "person doing cartwheel": "person cartwheeling",
    "wrestlers": "people wrestling",
    "water polo": "person playing water polo",
    "handball": "person playing handball",
    "juggling": "person juggling",
    "bath": "person taking bath",
    "sleeping accommodation": "person in bed",
    "guardsman": "guard",
    "man with turban": "person wearing turban",
    "bride with veil": "person with veil",
    "father christmas": "santa claus",
    "mother christmas": "mrs claus",
    "bust in silhouette": "silhouette of person",
    "busts in silhouette": "silhouette of people",
    "speaking head": "silhouette of speaking head",
    # things with a more usual name
    "automobile": "red car",
    "recreational vehicle": "blue car",
    "articulated lorry": "semi truck",
    "horizontal traffic light": "traffic light",
    "police cars revolving light": "police car light",
    "hocho": "kitchen knife",
    "basketball and hoop": "basketball",
    "billiards": "eight ball",
    "direct hit": "dartboard",
    "hot beverage": "cup of coffee",
    "personal computer": "laptop",
    "headphone": "headphones",
    "thong sandal": "flip-flop",
    "school satchel": "backpack",
    "roll of paper": "toilet paper",
    "shopping trolley": "shopping cart",
    "house building": "house",
    "keycap ten": "keycap 10",
    "aubergine": "eggplant",
    "ear of maize": "ear of corn",
    "cooking": "fried egg in pan",
    "steaming bowl": "bowl of ramen",
    "pistol": "water pistol",
    "chequered flag": "checkered flag",
    "electric torch": "flashlight",
    "electric light bulb": "light bulb",
    "left-pointing magnifying glass": "magnifying glass",
    "right-pointing magnifying glass": "magnifying glass pointing right",
    "mobile phone with rightwards arrow at left": "mobile phone with arrow",
    "envelope with downwards arrow above": "envelope with arrow",
    "speaker with cancellation stroke": "muted speaker",
    "bell with cancellation stroke": "muted bell",
    "banknote with yen sign": "yen banknote",
    "banknote with dollar sign": "dollar banknote",
    "banknote with euro sign": "euro banknote",
    "banknote with pound sign": "pound banknote",
    "chart with upwards trend and yen sign": "rising chart with yen sign",
    "chart with upwards trend": "rising chart",
    "chart with downwards trend": "falling chart",
    "silhouette of japan": "map of japan",
    "earth globe europe-africa": "globe showing europe and africa",
    "earth globe americas": "globe showing americas",
    "earth globe asia-australia": "globe showing asia and australia",
    "high voltage sign": "lightning bolt",
    "collision symbol": "collision",
    "hundred points symbol": "hundred points",
    "public address loudspeaker": "loudspeaker",
    "e-mail symbol": "e-mail",
    "six pointed star with middle dot": "six pointed star",
    "diamond shape with a dot inside": "diamond with dot",
}

# (subcategory pattern, name pattern, replacement): the first that matches is applied
RULES = (
    ("family", r"family: (.+)", r"family with \1"),
    ("family", r"(kiss|couple with heart): (\w+), (\w+)", r"\1 \2 and \3"),
    ("person.*", r"(\w+): bald", r"bald \1"),
    ("person.*", r"(\w+): (.+)", r"\1 with \2"),
    ("hand.*|sky & weather", r"(.+?) (?:sign|symbol)", r"\1"),
    ("geometric", r"large (\w+ (?:circle|square))", r"\1"),
    ("geometric", r"medium (\w+ circle)", r"\1"),
    ("geometric", r"(black|white) ((?:large|medium|small)(?: small)?) square", r"\2 \1 square"),
    ("alphanum", r"squared (\w+)", r"\1 button"),
    ("time", r"(.+) oclock", r"\1 o'clock"),
    ("clothing", r"(man|woman)s (.+)", r"\1's \2"),
)

# Countries that English names with an article.
_THE = re.compile(
    r"(.* )?(islands|republic|territor(y|ies)|union|nations|emirates|states|kingdom|netherlands)( .*)?|isle of .*"
    r"|bahamas|gambia|philippines|maldives|comoros|seychelles"
)


def caption_of(name: str, subcategory: str) -> str:
    """One caption: lower-case ASCII words, digits, hyphens and apostrophes, from an emoji's name and subcategory."""
    plain = _plain(name)
    if plain in PHRASES:
        return PHRASES[plain]
    if subcategory == "country-flag" or subcategory == "subdivision-flag":
        country = _words(plain.removesuffix(" flag"))
        return f"flag of the {country}" if _THE.fullmatch(country) else f"flag of {country}"
    for where, pattern, replacement in RULES:
        if re.fullmatch(where, subcategory) and re.fullmatch(pattern, plain):
            plain = re.sub(rf"^{pattern}$", replacement, plain)
            break
    return _words(plain)


def captions_of(entries: Sequence[dict]) -> list[str]:
    """The captions of all entries (`name`, `short_name`, `subcategory`), one for one, all different.

    Two entries may bear one name (the data calls both the person and the man in a tuxedo "MAN IN TUXEDO"): then the one whose
    short name disagrees is captioned from its short name. A caption still shared after that falls back to the entry's plain name.
    """
    names = Counter(entry["name"] for entry in entries)
    captions = []
    for entry in entries:
        spoken = entry["short_name"].replace("_", " ")
        clash = names[entry["name"]] > 1 and spoken != _plain(entry["name"])
        captions.append(caption_of(spoken if clash else entry["name"], entry["subcategory"]))
    shared = Counter(captions)
    return [
        _words(_plain(entry["name"])) if shared[caption] > 1 else caption for entry, caption in zip(entries, captions)
    ]


def _plain(name: str) -> str:
    """Lower case, typewriter apostrophes, no accents, "and" for "&"."""
    name = unicodedata.normalize("NFKD", name.replace("’", "'").replace("&", "and"))
    return name.encode("ascii", "ignore").decode().lower().strip()


def _words(text: str) -> str:
    """Only what a prompt needs: words, digits, inner hyphens and apostrophes, single spaces."""
    text = re.sub(r"[^a-z0-9' -]", " ", text.replace("u.s.", "us"))
    return re.sub(r"\s+", " ", re.sub(r"(?<![a-z0-9])-|-(?![a-z0-9])", " ", text)).strip()
