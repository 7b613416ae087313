"""The words that foils.py knows, in families: what looks alike is in one, and what is in two contradicts."""


def looks(families: dict[str, str]) -> dict[str, set[str]]:
    """{"red": "red crimson"} -> {"red": {"red"}, "crimson": {"red"}}: what looks alike is in one family."""
    return {word: set(names.split()) for names, words in families.items() for word in words.split()}


NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
# For each kind of attribute its words by family; words in one family (some are in two) do not contradict each other.
KINDS = {
    "color": looks(
        {
            "red": "red crimson scarlet",
            "red brown": "maroon burgundy",
            "orange": "orange",
            "yellow": "yellow gold golden",
            "green": "green",
            "blue": "blue navy",
            "blue green": "turquoise teal",
            "purple": "purple violet",
            "pink purple": "magenta",
            "pink": "pink",
            "brown": "brown",
            "brown white": "beige tan",
            "gray": "gray grey silver",
            "black": "black",
            "white": "white",
        }
    ),
    "shape": looks(
        {
            "round": "round circular spherical oval cylindrical",
            "round box": "oblong",  # a long circle or a long box
            "box": "square rectangular cubic",  # every square is a rectangle
            "cone": "triangular conical pyramidal",
            "pentagon": "pentagonal",
            "hexagon": "hexagonal",
            "octagon": "octagonal",
            "diamond": "diamond diamond-shaped",
            "teardrop": "teardrop teardrop-shaped",
            "crescent": "crescent crescent-shaped",
            "star": "star-shaped",
            "heart": "heart-shaped",
        }
    ),
    "material": looks(
        {
            "wood": "wooden wood",
            "metal": "metallic metal steel iron copper brass bronze",
            "glass": "glass",
            "plastic": "plastic rubber",
            "leather": "leather",
            "cloth": "fabric cotton woolen silk velvet denim linen fluffy furry fuzzy plush",
            "stone": "stone marble concrete brick granite",
            "paper": "paper cardboard",
        }
    ),
    "size": looks({"big": "big large huge enormous gigantic massive", "small": "small tiny miniature"}),
    "height": looks({"long": "tall long", "short": "short"}),
    "number": looks({word: f"{word} {value}" for value, word in enumerate(NUMBERS) if value > 1}),
    "surface": looks({"smooth": "smooth", "rough": "rough bumpy jagged rugged"}),
    "shine": looks({"shiny": "shiny polished gleaming", "dull": "dull matte rusty"}),
    "firmness": looks({"soft": "soft", "hard": "hard"}),
    "water": looks({"wet": "wet soaked", "dry": "dry"}),
    "thickness": looks({"thick": "thick", "thin": "thin"}),
    "width": looks({"wide": "wide", "narrow": "narrow"}),
    "door": looks({"open": "open", "closed": "closed"}),
    "dirt": looks({"clean": "clean", "dirty": "dirty muddy"}),
}
# What may replace a word of a kind, or one word of it; those of a family that the prompt names already are left out.
REPLACEMENTS = {
    "color": "red yellow green blue purple pink brown black white",
    "shape": "round square triangular hexagonal",
    "material": "wooden metallic glass plastic leather",
    "size": "big small",
    "height": "short",
    "short": "",  # a short man is not tall as short hair is not long
    "surface": "smooth rough",
    "shine": "shiny dull",
    "water": "wet dry",
    "thickness": "thick thin",
    "width": "wide narrow",
    "door": "open closed",
    "dirt": "clean dirty",
}
SECOND_CHOICE = ("surface", "shine", "firmness", "water", "thickness", "width", "door", "dirt")  # often not to be seen
SHADES = set("light dark bright pale deep vivid dull".split())  # these go with the colour after them
NOT_SHADED = {"black", "white"}
# Colours of two words, by their second: a sky blue wall does not become a sky red one.
COLOR_NAMES = set(
    "sky-blue navy-blue baby-blue royal-blue midnight-blue electric-blue cobalt-blue powder-blue ocean-blue lime-green "
    "olive-green forest-green mint-green emerald-green apple-green sea-green blood-red cherry-red ruby-red brick-red "
    "rose-red wine-red jet-black coal-black pitch-black snow-white milk-white ivory-white pearl-white hot-pink "
    "bubblegum-pink salmon-pink baby-pink lemon-yellow mustard-yellow canary-yellow ash-gray charcoal-gray ash-grey "
    "charcoal-grey chocolate-brown chestnut-brown rose-gold burnt-orange".split()
)
# A white zebra with black stripes is a black zebra with white stripes.
PATTERNS = set("stripe stripes striped zebra zebras checks checkered checkerboard chessboard patches spotted".split())
# Nouns, verbs or prepositions too: attributes only where a noun follows and no other noun goes before.
AMBIGUOUS = set(
    "orange gold silver violet tan round square oval diamond teardrop crescent oblong wood metal steel iron copper brass "
    "bronze glass plastic rubber leather fabric cotton silk velvet denim linen plush stone marble concrete brick granite "
    "paper cardboard tall long short smooth rough rugged dull polished gleaming soft hard wet soaked dry thick thin wide "
    "narrow open closed clean".split()
)
ATTRIBUTES = SHADES.union(*KINDS.values())
# What a number before it does not count, "three years", or counts in the name of something: "two door cars".
UNITS = set(
    "year years month months week weeks day days hour hours minute minutes second seconds o'clock percent inch inches feet "
    "meter meters metre metres mile miles kilometer kilometers kilometre kilometres pound pounds kilo kilos kilogram "
    "kilograms gram grams ton tons liter liters litre litres degree degrees dollar dollars cent cents euro euros times "
    "hundred thousand million dozen storey story stories storeys piece tone way tier layer speed quarter quarters half third "
    "thirds".split()
)
PARTS = set(
    "star seater door wheel wheeler lane legged dimensional sided headed eyed string ply course page point fold bedroom leaf "
    "poster pack person man".split()
)
ABOUT = set("about around nearly almost roughly approximately over under least most as to by x plus minimum maximum".split())
LABELS = set(
    "number no size iphone windows boeing route room channel page chapter level highway interstate flight gate platform bus "
    "line formula type version part episode season volume phase model mark grade player team area zone section unit track "
    "pier street avenue apollo".split()
)
SAME_PLURAL = set("sheep deer fish goldfish shrimp aircraft moose bison salmon trout squid dice cattle species".split())
PLURALS = {
    "man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen",
    "foot": "feet", "tooth": "teeth", "knife": "knives", "leaf": "leaves", "shelf": "shelves", "loaf": "loaves",
    "wolf": "wolves", "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "cactus": "cacti",
    "fungus": "fungi",
}  # fmt: skip

DETERMINERS = set("a an the this that its his her their my your some another one two three four five six".split())
_NOUN = rf"(?=\s+(?:{'|'.join(sorted(DETERMINERS))})\b)"  # "behind a tree", but not "behind schedule"
_LIGHT = r"sun|moon|stars|sky|sea|water|rain|rainbow|shade|care|guidance|influence|supervision|name|\w*light"
_IDIOM = rf"(?!\s+\w+ (?:\w+ ){{0,2}}(?:{_LIGHT})\b)"  # no thing to be on top of
RELATIONS = [  # pattern, what may take its place, whether it also turns when its two objects are exchanged
    (r"(?<=\bon the )left\b|(?<=\bto the )left\b|\bleft(?= of\b| side of\b)", ["right"], True),
    (r"(?<=\bon the )right\b|(?<=\bto the )right\b|\bright(?= of\b| side of\b)", ["left"], True),
    (r"(?<=\b[oa][nt] the )top(?= of\b)", ["bottom"], True),
    (r"(?<=\b[oa][nt] the )bottom(?= of\b)", ["top"], True),
    (rf"\b(?:on top of|atop){_NOUN}", ["under", "next to"], True),
    (rf"\babove{_NOUN}", ["below"], True),
    (rf"\bbelow{_NOUN}", ["above"], True),
    (rf"\b(?:under|underneath|beneath){_NOUN}{_IDIOM}", ["on top of"], True),
    (rf"\bin front of{_NOUN}", ["behind"], True),
    (rf"\b(?:hidden behind|hidden by|behind){_NOUN}", ["in front of"], True),
    (rf"\binside{_NOUN}", ["outside"], True),
    (rf"\boutside{_NOUN}", ["inside"], True),
    (rf"\b(?:near|next to|beside|on (?:the )?side of){_NOUN}", ["far away from"], False),
    (rf"\bfar (?:away )?from{_NOUN}", ["next to"], False),
]

SEXES = {"man": "woman", "men": "women", "boy": "girl", "boys": "girls"}
SEXES |= {other: one for one, other in SEXES.items()}
PRONOUNS = set("he she his her hers him himself herself".split())
POSTURES = {"sitting": "standing", "standing": "sitting", "lying": "standing", "walking": "running"}
POSTURES |= {"running": "walking", "jogging": "walking"}
LIVING = set("person man woman men women boy girl child baby people couple dog cat friends family student".split())

FUNCTION_WORDS = set(
    "a an the this that these those some another each every all both its his her their my your and or but nor of in on at by "
    "to from with without into onto over under above below beneath behind beside near through along across around against "
    "between inside outside next up down off out for as while when where which who is are was were be been being has have "
    "had do does it he she they him them there not very so than then".split()
)

# ---------------------------------------------------------------------------------------------------------------------
# What is left alone

# Attributes that before one of these words are part of its name, or cannot be seen.
NAMES = {
    (word, noun)
    for words, nouns in {
        "diamond": "ring rings necklace necklaces earring earrings bracelet bracelets brooch brooches pendant pendants jewelry "
        "jewellery tiara crown engagement wedding watch stud studs cufflink cufflinks tie choker anklet mine miner encrusted",
        "orange": "tree trees grove orchard juice slice slices peel peels zest segment segments wedge wedges blossom blossoms "
        "soda marmalade fruit fruits seller vendor",
        "navy": "ship ships officer officers sailor sailors base seal seals pilot jet soldier soldiers veteran vessel vessels",
        "gold golden": "hour rule age opportunity ratio gate mine miner miners rush standard",
        "silver bronze": "mine miner miners lining age",
        "black": "hole holes market friday magic death",
        "white": "noise lie lies",
        "green": "thumb energy",
        "black white brown": "man men woman women person people boy boys girl girls guy couple child children family",
        "square": "feet foot meter meters metre metres mile miles inch inches dance root one kilometers",
        "round": "trip trips two three one robin",
        "oval": "office",
        "metal metallic": "detector band bands concert fan head blue red green gold silver purple black gray grey",
        "brass": "band bands section",
        "cotton": "candy tail swab swabs",
        "velvet": "cake cupcake cupcakes ant",
        "silk": "worm worms road screen",
        "concrete": "mixer mixers jungle",
        "linen": "closet",
        "cubic": "meter meters metre metres feet foot inches zirconia",
        "circular": "saw saws",
        "crescent": "wrench wrenches",
        "wet": "suit suits nurse",
        "copper iron": "mine mines miner age man curtain colored coloured",
        "steel": "mill mills worker workers industry band",
        "glass": "blower blowers cutter maker ceiling bottom frog frogs",
        "wood": "burning working carving cutting carver shop chips chip pile duck ducks",
        "stone": "mason masons age cutter",
        "paper": "boy route trail round",
        "plastic": "surgeon surgeons surgery",
        "leather": "worker workers maker",
        "big": "brother brothers sister sisters deal day bang time toe step dream dreams smile hit success apple hug",
        "large huge enormous massive gigantic": "number numbers amount amounts success hit deal variety",
        "small tiny": "talk business step break",
        "tall": "order tale tales story",
        "short": "story stories film films break time while distance trip walk notice cut",
        "long": "time day days while way distance journey walk story jump exposure shot run trip night hours hike history "
        "exhausting line lines",
        "smooth": "jazz transition ride motion motions operation voice movement movements",
        "rough": "day time idea sketch draft night",
        "dull": "pain roar moment day sound",
        "soft": "voice music melody sound sounds drink spot whisper",
        "hard": "work rock time hat hats drive disk day worker workers cider candy boiled",
        "dry": "erase ice cleaning cleaner season humor",
        "clean": "air energy lines",
        "thin": "air",
        "wide": "variety range awake open",
        "open closed": "field fields space spaces water ocean road sea sky air mic house market mind arms flame fire plain "
        "plains",
    }.items()
    for word in words.split()
    for noun in nouns.split()
}
# After one of these its clause is left alone. "no" and the like deny one noun: "no cup and a plate" has a plate.
NO = set("no zero".split())
NEGATIONS = NO | set(
    "not never without w/o sans none neither nor nothing nobody nowhere cannot lack lacks lacked lacking minus except "
    "excluding excludes excluded omitting omits omitted devoid hardly barely scarcely rarely seldom instead avoid avoids "
    "avoiding refuse refuses refusing fails unable absent missing gone removed forbidden isnt arent wasnt werent dont doesnt "
    "lost losing lose loses want wants wanting invisible unseen imaginary formerly previously once forgot forgotten forgetting "
    "didnt cant wont hasnt havent non minus unlike dream dreams dreaming imagine imagines imagining wish wishes wishing "
    "pretend pretends pretending void w/out refused failed failing fail no-one havnt wouldnt couldnt doesn isn".split()
)
NEGATING = [  # the same in several words
    "free of", "free from", "empty of", "bare of", "clear of", "rid of", "anything but", "anything except", "all but",
    "anything other", "apart from", "aside from", "thinking of", "thinking about", "talking about", "in the absence of",
    "no one", "in place of", "as opposed to", "save for", "stripped of", "robbed of", "deprived of", "short of", "used to",
    "everything but", "looking for", "searching for", "in search of", "waiting for", "afraid of", "scared of", "hidden from",
    "out of sight", "ran out of", "run out of", "asking for", "hoping for",
]  # fmt: skip
GONE = set("absent missing gone nowhere removed omitted excluded forbidden lacking".split())  # what they deny may go before
PLACED = set("in on at there here visible present inside near seen shown anywhere among part included".split())
# Where one of these is, any of several pictures will do, or two things are compared: the whole sentence is left alone.
OPEN = set(
    "or either whether than any anything anyone whichever whatever maybe perhaps possibly probably optionally might could "
    "would if unless and/or e.g such including e.g.".split()
)
MANY_COLORS = set(
    "colorful colourful multicolored multicolor multicoloured multi-colored rainbow variegated iridescent".split()
)
ENDS = set(".!?;:,()—–|")  # of clauses
STARTS = DETERMINERS | set(
    "there it he she they we i who which while with behind beside on in at under above near next".split()
)
FINITE = set("is are was were has have had".split())
# A noun goes before these, as in "the orange fell": ambiguous words are nouns there.
VERBS = set(
    "sat lay stood hung shone fell rolled held grew cut lit glowed is can will should must may shall sits lies stands hangs "
    "shines falls rolls holds grows cuts glows glitters sparkles glistens refracts reflects gleams floats rests covers fills "
    "shimmers spins together apart away too sparkle shine glitter glisten refract reflect gleam shimmer lie sit made full half "
    "empty upside".split()
)
NOT_VERBS = set(  # though they end in "-ed" or "-ing", or in "-s" after "a"
    "bed shed sled seed weed reed feed steed moped breed bobsled pants shoes jeans shorts glasses scissors clothes gloves "
    "boots sneakers trousers socks building ceiling ring string wing painting railing clothing earring swing spring pudding "
    "icing frosting awning carving flooring sling casing lining coating fencing paving paneling covering".split()
)
# What cannot be far, or has no place of its own.
NEVER_FAR = set(
    "sky horizon sun edge end top bottom middle center centre beginning side corner front back face eye eyes ear ears nose "
    "mouth chin cheek head neck hand hands arm arms leg legs foot feet chest knee knees shoulder shoulders hair tail paw paws "
    "finger fingers thumb wrist ankle lips forehead teeth moon star stars planet rainbow camera viewer ground floor surface "
    "shadow reflection ceiling wall walls air".split()
)
NO_PLACE = set("wheel wheels scenes times bars camera world lungs voice game list class".split())  # "on top of the world"
NOT_STANDING = set("back side stomach belly hind toes tiptoe tiptoes head knees haunches".split())  # as on its hind legs
SAME_THING = (
    "couch sofa settee, cup mug, bike bicycle, car automobile, rug carpet, airplane plane aeroplane aircraft jet, stone rock, "
    "television tv, phone smartphone telephone cellphone, ball sphere, cube box block, refrigerator fridge, bunny rabbit, "
    "woman lady, man guy gentleman, child kid, road street"
).split(", ")
GENERAL = {
    "person": "man woman boy girl child baby adult teenager student teacher doctor chef farmer artist guy lady kid",
    "child": "boy girl", "bird": "duck chicken goose owl parrot penguin swan", "bag": "purse backpack handbag",
    "boat": "ship", "computer": "laptop", "dog": "puppy", "cat": "kitten", "coat": "jacket", "hat": "cap",
    "flower": "rose tulip sunflower daisy",
}  # fmt: skip
# Every word with those that may be said of the same thing.
ALIKE: dict[str, set[str]] = {}
for _group in (*SAME_THING, *(f"{one} {other}" for one, others in GENERAL.items() for other in others.split())):
    for _word in _group.split():
        ALIKE.setdefault(_word, set()).update(_group.split())

OTHERS = set("one ones other others another".split())  # they stand for a thing like one before: "a red cube and a blue one"

# ---------------------------------------------------------------------------------------------------------------------
# Who does what with which thing

# What is done, and to which other things: such as no picture shows by chance.
_STRANGE = "snake, elephant, pumpkin, bicycle, teddy bear"
_HELD = "umbrella, guitar, teddy bear, pumpkin, broom, trophy"
_ANIMALS = "goat, horse, pig"
_PARTNERS = "robot, parrot, snowman"
ACTIONS = {
    verb: objects.replace(", ", ",").split(",")
    for verbs, objects in {
        "holding, carrying, lifting, using, clutching": _HELD,
        "looking at, staring at, gazing at, admiring, examining, studying, observing, watching, photographing": _STRANGE,
        "wearing": "spacesuit, suit of armor",
        "playing with": "kite, teddy bear, puppy, drum",
        "riding": "camel, elephant, motorcycle, skateboard",
        "climbing, climbing up": "lamppost, palm tree",
        "reading": "newspaper, map",
        "driving": "tractor, fire truck",
        "walking, walking with, petting, feeding, jogging with, running with": _ANIMALS,
        "building, assembling": "snowman, birdhouse",
        "fixing, repairing": "clock, boat, bicycle",
        "pushing, pulling": "wheelbarrow, piano",
        "eating": "watermelon, sandwich, carrot",
        "chasing, barking at, running after": "chicken, cow",
        "throwing, catching, kicking, tossing, chewing on, fetching": "pumpkin, shoe",
        "jumping over": "fence, log",
        "talking to, speaking to, talking with, hugging, kissing, dancing with, chatting with": _PARTNERS,
        "opening": "umbrella, suitcase",
        "knitting, sewing": "scarf, hat, sock",
        "flying": "kite, drone",
        "taking": "nap, bath",
        "having": "pillow fight, boxing match",
        "exploring": "supermarket, factory",
    }.items()
    for verb in verbs.split(", ")
}
# After "playing", "practicing" or "doing": what is done, and what cannot be taken for any of it. Football may be soccer.
FAMILIES = [
    ("guitar violin piano trumpet flute drum drums saxophone cello harmonica harp", "guitar violin piano trumpet drums"),
    (
        "soccer basketball tennis golf hockey baseball volleyball chess poker hopscotch badminton cricket football rugby",
        "basketball tennis golf chess baseball",
    ),
    ("yoga laundry homework pottery aerobics gymnastics ballet archery karate calligraphy", "laundry archery pottery"),
]
# Too vague to exclude anything, or likely to come with what would replace it.
VAGUE = set(
    "thing things object objects item items something anything gift gifts present presents product products tool tools "
    "instrument instruments toy toys pet pets animal animals creature creatures wildlife herd zoo collection fruit vegetable "
    "vegetables food meal snack dish vehicle machine structure model models photo photos picture pictures selfie book's break "
    "rest fight way skill skills knowledge imagination experience talent pose display piece work art pair place places care "
    "part turns turn time fun lot look performance show parade".split()
)
SINGULAR = set("a an the his her their its my your".split())
RESTING = set("sleeping napping snoozing snoring resting lounging relaxing meditating".split())
BUSY = set(
    "dancing jumping swimming skydiving snorkeling kayaking canoeing fishing hiking gardening shopping singing screaming "
    "coughing sneezing skating skiing surfing climbing cooking painting drawing typing writing reading studying knitting "
    "sewing exercising running racing swinging skateboarding snowboarding sketching playing walking splashing "
    "jogging juggling birdwatching rolling working clapping arguing talking chatting cleaning "
    "digging eating drinking marching bowling boxing cycling diving".split()
)
MOVING = set(
    "jumping running walking hiking jogging skating racing marching skipping hopping dancing strolling climbing".split()
)
HAPPY = set("laughing smiling grinning giggling".split())
UNHAPPY = set("crying weeping sobbing frowning screaming".split())
STAYS = set("in at by near under during outside inside and on while".split())
GOES = set("through over across along around down up".split())
# Somebody for somebody who excludes him, in another's place too; those of one line look too much alike.
PEOPLE = {
    "adult": "child kid baby toddler infant",
    "adults": "children kids babies toddlers",
    "robot": "person someone adult teenager doctor nurse teacher chef cook baker farmer firefighter fireman artist painter "
    "sculptor musician guitarist pianist drummer photographer dentist surgeon scientist astronomer gardener hairdresser "
    "barber bartender waiter seamstress tailor carpenter welder mechanic plumber electrician surfer skateboarder cyclist "
    "runner athlete swimmer dancer ballerina skater climber hiker traveler tourist student author writer poet detective "
    "lawyer judge soldier pilot astronaut fisherman librarian mountaineer motorcyclist biker skier snowboarder kayaker gamer "
    "worker builder gymnast boxer singer model parent friend glassblower jeweler potter beautician therapist geologist camper "
    "shopper cashier customer coach conductor engineer programmer magician clown juggler acrobat golfer photographer sailor "
    "butcher florist vet veterinarian",
    "robots": "people friends adults teenagers students tourists coworkers workers colleagues musicians dancers hikers parents",
    "cat": "dog puppy",
    "dog": "cat kitten",
    "cats": "dogs puppies",
    "dogs": "cats kittens",
    "cow": "horse",
    "horse": "cow",
}
PEOPLE = {old: new for new, olds in PEOPLE.items() for old in olds.split()}
ALIVE = (
    LIVING | set(PEOPLE) | {word + "s" for word in PEOPLE} | set("cow horse bird group crowd team class mother father".split())
)
HIS = {"he": "she", "she": "he", "him": "her", "himself": "herself", "herself": "himself", "hers": "his"}
KIN = set(
    "wife husband girlfriend boyfriend mother father mom dad sister brother son daughter king queen lady bride groom".split()
)
