"""House rules: games whose clean/heat/cool/lamp operation is replaced by a random operation with a random tool.

They teach an agent the *interface* (search, take, operate, move) while the real rules stay withheld: in a house-rule
game the commands clean, heat, cool and use do not exist and no text names them. The module rewrites the PDDL domain
and the grammar of one game; it knows nothing of rooms, placement or files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from ragdistill.envs.alfworld import assets
from ragdistill.envs.alfworld.goals import HOUSE_AT, HOUSE_WITH
from ragdistill.errors import ConfigError

Form = Literal["with", "at"]
WITHHELD = (
    "clean", "wash", "rinse", "heat", "warm", "cook", "hot", "cool", "cold", "chill", "freeze", "look", "examine",
    "use", "light",
)  # fmt: skip
"""Words of the real rules: never a verb or adjective of a house rule."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`verb/adjective` words of a block."""
    return tuple((verb, adjective) for verb, _, adjective in (word.partition("/") for word in text.split()))


REGULAR = _pairs("""
polish/polished scan/scanned weigh/weighed stamp/stamped bless/blessed iron/ironed paint/painted wax/waxed
measure/measured label/labelled wrap/wrapped brush/brushed press/pressed sign/signed mark/marked dust/dusted
glaze/glazed oil/oiled sand/sanded spin/spun fold/folded stretch/stretched photograph/photographed
register/registered repair/repaired tune/tuned charm/charmed count/counted number/numbered test/tested
varnish/varnished seal/sealed steam/steamed soak/soaked salt/salted sugar/sugared dye/dyed engrave/engraved
inspect/inspected magnetise/magnetised insure/insured price/priced tag/tagged tie/tied rub/rubbed shake/shaken
knit/knitted pickle/pickled smoke/smoked gild/gilded
""")
"""(verb, participle): the adjective tells the verb, as in "clean"."""

IRREGULAR = _pairs("""
shrink/tiny scent/fragrant dry/dry darken/dark fix/whole charge/full drain/empty enlarge/huge soften/soft
harden/firm sharpen/keen flatten/flat inflate/round crown/royal starch/stiff bleach/white ink/black grease/slippery
season/tasty tear/ragged bury/hidden balance/steady grind/fine wet/moist
""")
"""(verb, adjective): the adjective does not spell the verb, as in "hot" and "heat"."""

VOCABULARY = REGULAR + IRREGULAR
GENERIC = _pairs("""
employ/employed apply/applied operate/operated utilise/utilised activate/activated engage/engaged trigger/triggered
handle/handled run/running start/started work/working control/controlled enable/enabled turn/turned push/pushed
pull/pulled touch/touched tap/tapped set/set
""")
"""What one does with any device: most verbs of form "at", so that trial and error there looks for such verbs."""
GENERIC_SHARE = 0.7
FIXTURES = _words("""
Abacus Anvil Barometer Bellows Bongo Compass Cowbell Deskbell Deskfan Deskglobe Deskmirror Deskscale Doorbell Drum
Easel Fishtank Floorfan Floorglobe Floormirror Floorscale Globe Gong Gramophone Handbell Harp Hourglass Humidifier
Jukebox Kaleidoscope Loom Magnifier Metronome Microscope Musicbox Pendulum Periscope Piano Pinwheel Prism Projector
Radio Robot Sewingmachine Shelfclock Snowglobe Spinningwheel Standfan Standmirror Stereo Sundial Tablebell Tablefan
Tablemirror Telescope Terrarium Tripod Tuningfork Turntable Typewriter Wallclock Weathervane Weighingscale Windchime
Xylophone
""")
"""Tools of form "at": objects that ALFWorld does not have, so that an agent must match the goal's word with what it
sees. With ALFWorld's own objects as tools it learnt which objects are tools, and looked past every lamp."""
_DROPPED = ("CleanObject", "HeatObject", "CoolObject", "ToggleObject", "SliceObject", "help")
_ACTION = "HouseRule"


class HouseRule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule.

    Form "with": `{verb} {object} with {tool}`, the tool a receptacle. Form "at": `{verb} {tool}` with the object in
    hand, the tool an object that stands somewhere (the shape of "use desklamp 1").
    """

    verb: str
    adjective: str
    tool_type: str
    """Receptacle type ("Desk") or, for form "at", one of `FIXTURES`, in PDDL spelling."""
    form: Form

    @property
    def kind(self) -> str:
        """The game's task kind."""
        return HOUSE_WITH if self.form == "with" else HOUSE_AT

    def command(self, obj: str, tool: str) -> str:
        """The operation as a command, with in-game names."""
        return f"{self.verb} {obj} with {tool}" if self.form == "with" else f"{self.verb} {tool}"


def sample_rule(rng: random.Random, tool_types: Sequence[str], form: Form) -> HouseRule:
    """A rule with a drawn vocabulary pair and a uniformly drawn tool type."""
    verb, adjective = rng.choice(GENERIC if form == "at" and rng.random() < GENERIC_SHARE else VOCABULARY)
    return HouseRule(verb=verb, adjective=adjective, tool_type=rng.choice(sorted(tool_types)), form=form)


def wrong_verbs(rng: random.Random, right: str, count: int) -> list[str]:
    """Other verbs to try on a tool of form "at", in random order, most of them generic."""
    generic, special = ([v for v, _ in pairs if v != right] for pairs in (GENERIC, VOCABULARY))
    many = min(round(count * GENERIC_SHARE), len(generic))
    drawn = rng.sample(generic, many) + rng.sample(special, count - many)
    rng.shuffle(drawn)
    return drawn


def check_rule(rule: HouseRule) -> None:
    """`ConfigError` when a rule's words belong to the withheld rules or are not plain lower-case words."""
    for word in (rule.verb, rule.adjective):
        if not re.fullmatch("[a-z]+", word) or word in WITHHELD:
            raise ConfigError(f"{word!r} cannot be a house-rule word; take a pair from houserules.VOCABULARY.")


def house_domain(rule: HouseRule) -> str:
    """The wheel's PDDL domain with the rule's operation instead of clean, heat, cool, toggle, slice and help."""
    check_rule(rule)
    text = re.sub(r";[^\n]*", "", assets.domain())
    for name in _DROPPED:
        text = _cut(text, f"(:action {name}")
    extra, tool = "", f"(receptacleType ?r {rule.tool_type}Type)"
    if rule.form == "at":
        extra = " ?t - object"
        tool = f"(objectType ?t {rule.tool_type}Type) (inReceptacle ?t ?r) (or (not (openable ?r)) (opened ?r))"
    operation = f"""
(:action {_ACTION}
    :parameters (?a - agent ?l - location ?r - receptacle ?o - object{extra})
    :precondition (and
            (cleanable ?o)
            {tool}
            (atLocation ?a ?l)
            (receptacleAtLocation ?r ?l)
            (holds ?a ?o)
            )
    :effect (and (isClean ?o) (increase (total-cost) 5))
)
"""
    end = text.rindex(")")
    return text[:end] + operation + text[end:]


def _cut(text: str, head: str) -> str:
    """Remove the balanced parenthesis that starts with `head`."""
    start = text.index(head)
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return text[:start] + text[i + 1 :]
    raise ConfigError("The installed alfworld domain is not balanced PDDL; reinstall alfworld.")


def house_grammar(rule: HouseRule) -> str:
    """The wheel's grammar with the rule's command and feedback, and without any text about the withheld rules."""
    check_rule(rule)
    text = assets.grammar()
    for name in _DROPPED:
        text = re.sub(rf"\naction {name} {{\n.*?\n}}\n", "\n", text, flags=re.DOTALL)
    text = re.sub(
        r'\{\s*"condition": "(?:isclean|ishot|iscool|toggleable|sliceable)\([^"]*",\s*"rhs": "[^"]*"\s*\},\s*', "", text
    )
    text = text.replace(
        '"examineObject.feedback": [',
        '"examineObject.feedback": [\n            {\n                "condition": "isclean(o:object)",\n'
        f'                "rhs": "The {{o.name}} is {rule.adjective}."\n            }},',
    )
    template, feedback = f"{rule.verb} {{o}} with {{r}}", f"You {rule.verb} the {{o.name}} using the {{r.name}}."
    if rule.form == "at":
        template, feedback = f"{rule.verb} {{t}}", f"You {rule.verb} the {{t.name}}."
    return text + (
        f'\naction {_ACTION} {{\n    template :: "{template}";\n    feedback :: "#houseRule.feedback#";\n\n'
        f'    grammar :: """\n        {{"houseRule.feedback": [{{"rhs": "{feedback}"}}]}}\n    """;\n}}\n'
    )


def house_goal(rule: HouseRule) -> str:
    """PDDL goal with `{obj}` and `{recep}` slots and ` # ` for ` - `, closing the problem like the goal library's."""
    if rule.form == "at":
        inner = "(exists (?o # object ?a # agent) (and (objectType ?o {obj}Type) (isClean ?o) (holds ?a ?o)))"
    else:
        inner = (
            "(exists (?r # receptacle) (exists (?o # object) (and (objectType ?o {obj}Type)"
            " (receptacleType ?r {recep}Type) (isClean ?o) (inReceptacle ?o ?r))))"
        )
    return f"\n        (:goal (and {inner}))\n    )\n"
