"""German minimal pairs from templates: agreement, case, separable verbs, word order, negation.

Each phenomenon crosses a few words with a template; the two sentences of a pair differ in the one property that makes
the second ungrammatical. The words are chosen such that the second has no other reading: no object that could be a
fronted subject (`Die Frau sieht der Mann` is grammatical), no participle with both auxiliaries (`hat gefallen`).
No speaker has validated the pairs yet.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

Pairs = Iterator[tuple[str, str]]


class Noun(NamedTuple):
    """A noun; `gender` m, f or n."""

    singular: str
    gender: str
    plural: str
    genitive: str = ""


NOMINATIVE = {"m": "der", "f": "die", "n": "das"}
ACCUSATIVE = {"m": "den", "f": "die", "n": "das"}
DATIVE = {"m": "dem", "f": "der", "n": "dem"}

MEN = (
    Noun("Arzt", "m", "Ärzte", "Arztes"),
    Noun("Koch", "m", "Köche", "Kochs"),
    Noun("Sohn", "m", "Söhne", "Sohnes"),
    Noun("Gast", "m", "Gäste", "Gastes"),
    Noun("Freund", "m", "Freunde", "Freundes"),
    Noun("König", "m", "Könige", "Königs"),
    Noun("Wirt", "m", "Wirte", "Wirts"),
    Noun("Dieb", "m", "Diebe", "Diebs"),
)
WOMEN = (
    Noun("Frau", "f", "Frauen"),
    Noun("Ärztin", "f", "Ärztinnen"),
    Noun("Lehrerin", "f", "Lehrerinnen"),
    Noun("Köchin", "f", "Köchinnen"),
    Noun("Freundin", "f", "Freundinnen"),
    Noun("Schwester", "f", "Schwestern"),
    Noun("Tante", "f", "Tanten"),
    Noun("Königin", "f", "Königinnen"),
)
CHILDREN = (Noun("Kind", "n", "Kinder", "Kindes"), Noun("Pferd", "n", "Pferde", "Pferdes"))
PERSONS = MEN + WOMEN + CHILDREN
THINGS = (
    Noun("Tisch", "m", "Tische", "Tisches"),
    Noun("Stuhl", "m", "Stühle", "Stuhls"),
    Noun("Schrank", "m", "Schränke", "Schranks"),
    Noun("Baum", "m", "Bäume", "Baums"),
    Noun("Brief", "m", "Briefe", "Briefs"),
    Noun("Lampe", "f", "Lampen"),
    Noun("Tasche", "f", "Taschen"),
    Noun("Flasche", "f", "Flaschen"),
    Noun("Blume", "f", "Blumen"),
    Noun("Buch", "n", "Bücher", "Buches"),
    Noun("Haus", "n", "Häuser", "Hauses"),
    Noun("Bild", "n", "Bilder", "Bildes"),
    Noun("Fahrrad", "n", "Fahrräder", "Fahrrads"),
)
# Singular and plural of the third person.
INTRANSITIVE = (
    *(("schläft", "schlafen"), ("lacht", "lachen"), ("singt", "singen"), ("tanzt", "tanzen")),
    *(("wartet", "warten"), ("arbeitet", "arbeiten"), ("weint", "weinen"), ("schweigt", "schweigen")),
)
WHEN = ("heute", "oft", "immer", "manchmal", "gerade", "wieder")
WHERE = ("im Garten", "im Haus", "in der Stadt", "auf dem Markt", "am Fenster", "vor der Tür")
# Particle, third person, infinitive and participle of the verb without it, and an object.
SEPARABLE = (
    ("auf", "macht", "machen", "gemacht", "die Tür"),
    ("zu", "macht", "machen", "gemacht", "das Fenster"),
    ("an", "zündet", "zünden", "gezündet", "die Kerze"),
    ("ab", "holt", "holen", "geholt", "das Paket"),
    ("ein", "packt", "packen", "gepackt", "den Koffer"),
    ("aus", "schaltet", "schalten", "geschaltet", "das Licht"),
    ("mit", "bringt", "bringen", "gebracht", "den Kuchen"),
    ("weg", "wirft", "werfen", "geworfen", "die Zeitung"),
    ("vor", "liest", "lesen", "gelesen", "die Geschichte"),
    ("auf", "räumt", "räumen", "geräumt", "das Zimmer"),
)
TRANSITIVE = (
    *(("liest", "gelesen", "das Buch"), ("schreibt", "geschrieben", "den Brief"), ("kauft", "gekauft", "das Brot")),
    *(("trinkt", "getrunken", "den Tee"), ("sucht", "gesucht", "den Schlüssel"), ("malt", "gemalt", "das Bild")),
    *(("putzt", "geputzt", "die Fenster"), ("singt", "gesungen", "das Lied"), ("baut", "gebaut", "die Mauer")),
)


def the(noun: Noun, articles: dict[str, str] = NOMINATIVE) -> str:
    return f"{articles[noun.gender]} {noun.singular}"


def start(text: str) -> str:
    """The text as the beginning of a sentence."""
    return text[0].upper() + text[1:]


# --- Agreement --------------------------------------------------------------------------------------------------------


def subject_verb_number() -> Pairs:
    for noun, (one, many), where in product(PERSONS, INTRANSITIVE, WHERE):
        yield f"{start(the(noun))} {one} {where}.", f"{start(the(noun))} {many} {where}."
        yield f"Die {noun.plural} {many} {where}.", f"Die {noun.plural} {one} {where}."


def subject_verb_number_with_attractor() -> Pairs:
    """A plural noun between a singular subject and its verb."""
    for noun, other, (one, many), when in product(PERSONS, PERSONS, INTRANSITIVE, WHEN):
        if noun != other:
            plural = other.plural if other.plural.endswith("n") else other.plural + "n"
            yield (
                f"{start(the(noun))} neben den {plural} {one} {when}.",
                (f"{start(the(noun))} neben den {plural} {many} {when}."),
            )


def subject_verb_person() -> Pairs:
    stems = ("sing", "lach", "wein", "komm", "schwimm", "träum", "renn", "lern", "koch")
    endings = {"Ich": "e", "Du": "st", "Wir": "en", "Ihr": "t"}
    for stem, (pronoun, ending), wrong, when in product(stems, endings.items(), endings.values(), WHEN):
        if wrong != ending:
            yield f"{pronoun} {stem}{ending} {when}.", f"{pronoun} {stem}{wrong} {when}."


def determiner_noun_gender() -> Pairs:
    for noun, wrong, where in product(THINGS, NOMINATIVE.values(), WHERE):
        if wrong != NOMINATIVE[noun.gender]:
            yield f"{start(the(noun))} steht {where}.", f"{start(wrong)} {noun.singular} steht {where}."


def adjective_ending() -> Pairs:
    right = {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")}
    wrong = {"m": "er", "f": "en", "n": "en"}
    for noun, adjective, who in product(THINGS, ("alt", "neu", "klein", "schön"), (*MEN[:4], *WOMEN[:4])):
        article, ending = right[noun.gender]
        yield tuple(  # type: ignore[misc]
            f"{start(the(who))} kauft {article} {adjective}{e} {noun.singular}." for e in (ending, wrong[noun.gender])
        )


def relative_pronoun_gender() -> Pairs:
    for noun, wrong, (one, _), where in product(PERSONS, NOMINATIVE.values(), INTRANSITIVE, WHERE):
        if wrong != NOMINATIVE[noun.gender]:
            yield tuple(  # type: ignore[misc]
                f"{start(the(noun))}, {pronoun} {where} steht, {one}." for pronoun in (NOMINATIVE[noun.gender], wrong)
            )


def reflexive_person() -> Pairs:
    """`sich` belongs to the third person; any other pronoun could be an object."""
    verbs = ("wasch", "freu", "ärger", "setz", "beeil", "versteck", "entschuldig", "verteidig")
    persons = (("Ich", "e", "mich"), ("Wir", "en", "uns"), ("Ihr", "t", "euch"))
    for verb, (pronoun, ending, reflexive), when in product(verbs, persons, WHEN):
        form = verb + ("n" if (verb, ending) == ("ärger", "en") else ending)
        yield f"{pronoun} {form} {reflexive} {when}.", f"{pronoun} {form} sich {when}."


def plural_after_number() -> Pairs:
    for noun, number, (_, many), where in product(MEN + WOMEN, ("Zwei", "Drei", "Vier"), INTRANSITIVE, WHERE):
        yield f"{number} {noun.plural} {many} {where}.", f"{number} {noun.singular} {many} {where}."


# --- Case -------------------------------------------------------------------------------------------------------------


def dative_after_preposition() -> Pairs:
    verbs = {"mit": ("tanzt", "singt", "spricht"), "bei": ("wohnt", "schläft"), "von": ("träumt", "erzählt")}
    yield from after_preposition(verbs, DATIVE, ACCUSATIVE)


def accusative_after_preposition() -> Pairs:
    verbs = {"für": ("arbeitet", "kocht", "singt"), "ohne": ("tanzt", "reist", "lacht"), "gegen": ("spielt", "kämpft")}
    yield from after_preposition(verbs, ACCUSATIVE, DATIVE)


def after_preposition(verbs: dict[str, tuple[str, ...]], right: dict[str, str], wrong: dict[str, str]) -> Pairs:
    for noun, preposition, who in product(PERSONS, verbs, WOMEN):
        for verb in verbs[preposition] if noun != who else ():
            head = f"{start(the(who))} {verb} {preposition}"
            yield f"{head} {the(noun, right)}.", f"{head} {the(noun, wrong)}."


def dative_verb() -> Pairs:
    verbs = ("hilft", "dankt", "folgt", "antwortet", "gratuliert", "vertraut")
    for who, verb, noun in product(MEN + WOMEN, verbs, PERSONS):
        if who != noun:
            yield tuple(  # type: ignore[misc]
                f"{start(the(who))} {verb} {the(noun, case)}." for case in (DATIVE, ACCUSATIVE)
            )


def accusative_object() -> Pairs:
    """A masculine subject and object: each case is visible, so that no other order of the two can be meant."""
    for who, verb, noun, when in product(MEN, ("sieht", "sucht", "ruft", "kennt", "besucht", "fragt"), MEN, WHEN[:2]):
        if who != noun:
            yield tuple(  # type: ignore[misc]
                f"{start(the(who))} {verb} {when} {the(noun, case)}." for case in (ACCUSATIVE, NOMINATIVE)
            )


def genitive_ending() -> Pairs:
    owned = ("Das Auto", "Die Stimme", "Der Name", "Das Zimmer", "Die Mutter", "Der Hut")
    for thing, noun, quality in product(owned, MEN + CHILDREN[1:], ("schön", "bekannt")):
        yield tuple(f"{thing} des {form} ist {quality}." for form in (noun.genitive, noun.singular))  # type: ignore[misc]


# --- Verbs ------------------------------------------------------------------------------------------------------------


def separable_verb_main_clause() -> Pairs:
    for who, (particle, verb, _, _, thing), when in product(PERSONS[:16], SEPARABLE, WHEN[:3]):
        subject = start(the(who))
        yield f"{subject} {verb} {when} {thing} {particle}.", f"{subject} {particle}{verb} {when} {thing}."


def separable_verb_subordinate_clause() -> Pairs:
    for who, (particle, verb, _, _, thing), head in product(PERSONS[:16], SEPARABLE, ("Ich weiß", "Wir hoffen")):
        clause = f"{head}, dass {the(who)} {thing}"
        yield f"{clause} {particle}{verb}.", f"{clause} {verb} {particle}."


def separable_verb_infinitive() -> Pairs:
    heads = ("versucht", "beginnt", "verspricht")
    for who, (particle, _, infinitive, _, thing), head in product(PERSONS[:16], SEPARABLE, heads):
        clause = f"{start(the(who))} {head}, {thing}"
        yield f"{clause} {particle}zu{infinitive}.", f"{clause} zu {particle}{infinitive}."


def separable_verb_participle() -> Pairs:
    for who, (particle, _, _, participle, thing), when in product(PERSONS[:16], SEPARABLE, WHEN[:3]):
        clause = f"{start(the(who))} hat {when} {thing}"
        yield f"{clause} {particle}{participle}.", f"{clause} ge{particle}{participle.removeprefix('ge')}."


def auxiliary_of_the_perfect() -> Pairs:
    with_sein = ("gekommen", "geblieben", "verschwunden", "eingeschlafen", "aufgewacht", "angekommen")
    with_haben = ("geschlafen", "gearbeitet", "gelacht", "geweint", "geschwiegen", "gewartet")
    for who, when in product(PERSONS, WHEN[:3]):
        subject = start(the(who))
        for right, wrong, participles in (("ist", "hat", with_sein), ("hat", "ist", with_haben)):
            for participle in participles:
                yield f"{subject} {right} {when} {participle}.", f"{subject} {wrong} {when} {participle}."


def modal_verb_infinitive() -> Pairs:
    for who, modal, (_, infinitive), when in product(PERSONS, ("will", "kann", "muss", "darf"), INTRANSITIVE, WHEN[:2]):
        subject = start(the(who))
        yield f"{subject} {modal} {when} {infinitive}.", f"{subject} {modal} {when} zu {infinitive}."


# --- Word order -------------------------------------------------------------------------------------------------------


def verb_second() -> Pairs:
    for who, (one, _), when in product(PERSONS, INTRANSITIVE, WHEN):
        for where in WHERE[:2]:
            yield f"{start(when)} {one} {the(who)} {where}.", f"{start(when)} {the(who)} {one} {where}."


def verb_last_in_a_subordinate_clause() -> Pairs:
    for who, (verb, _, thing), head in product(PERSONS, TRANSITIVE, ("Ich weiß nicht, ob", "Wir fragen, ob")):
        yield f"{head} {the(who)} heute {thing} {verb}.", f"{head} {the(who)} {verb} heute {thing}."


def participle_last() -> Pairs:
    for who, (_, participle, thing), when in product(PERSONS, TRANSITIVE, WHEN[:3]):
        subject = start(the(who))
        yield f"{subject} hat {when} {thing} {participle}.", f"{subject} hat {participle} {when} {thing}."


# --- Negation ---------------------------------------------------------------------------------------------------------


def negation_position() -> Pairs:
    for who, (one, _), when in product(PERSONS, INTRANSITIVE, ("heute", "gerade", "manchmal")):
        yield f"{start(the(who))} {one} {when} nicht.", f"{start(the(who))} nicht {one} {when}."


def negation_before_sondern() -> Pairs:
    opposites = (("alt", "neu"), ("groß", "klein"), ("teuer", "billig"), ("schwer", "leicht"), ("hell", "dunkel"))
    for noun, (one, other), verb in product(THINGS, opposites, ("ist", "war")):
        head = f"{start(the(noun))} {verb}"
        yield f"{head} nicht {one}, sondern {other}.", f"{head} {one}, sondern {other}."


def weder_noch() -> Pairs:
    for one, other, (singular, _), when in product(PERSONS, PERSONS, INTRANSITIVE, WHEN[:2]):
        if one != other:
            head = f"Weder {the(one)}"
            yield f"{head} noch {the(other)} {singular} {when}.", f"{head} oder {the(other)} {singular} {when}."


PHENOMENA: dict[str, dict[str, Callable[[], Pairs]]] = {
    "agreement": {
        "subject_verb_number": subject_verb_number,
        "subject_verb_number_with_attractor": subject_verb_number_with_attractor,
        "subject_verb_person": subject_verb_person,
        "determiner_noun_gender": determiner_noun_gender,
        "adjective_ending": adjective_ending,
        "relative_pronoun_gender": relative_pronoun_gender,
        "reflexive_person": reflexive_person,
        "plural_after_number": plural_after_number,
    },
    "case": {
        "dative_after_preposition": dative_after_preposition,
        "accusative_after_preposition": accusative_after_preposition,
        "dative_verb": dative_verb,
        "accusative_object": accusative_object,
        "genitive_ending": genitive_ending,
    },
    "verbs": {
        "separable_verb_main_clause": separable_verb_main_clause,
        "separable_verb_subordinate_clause": separable_verb_subordinate_clause,
        "separable_verb_infinitive": separable_verb_infinitive,
        "separable_verb_participle": separable_verb_participle,
        "auxiliary_of_the_perfect": auxiliary_of_the_perfect,
        "modal_verb_infinitive": modal_verb_infinitive,
    },
    "word_order": {
        "verb_second": verb_second,
        "verb_last_in_a_subordinate_clause": verb_last_in_a_subordinate_clause,
        "participle_last": participle_last,
    },
    "negation": {
        "negation_position": negation_position,
        "negation_before_sondern": negation_before_sondern,
        "weder_noch": weder_noch,
    },
}


def german_pairs(per_phenomenon: int = 100) -> list[dict[str, str]]:
    """The pairs, `per_phenomenon` of each, always the same: `sentence_good`, `sentence_bad`, `phenomenon`, `field`.

    Raises ValueError if a phenomenon has fewer pairs.
    """
    items = []
    for field, phenomena in PHENOMENA.items():
        for name, generate in phenomena.items():
            pairs = sorted(set(generate()))
            if len(pairs) < per_phenomenon:
                raise ValueError(f"{name} has {len(pairs)} pairs, fewer than {per_phenomenon}")
            for good, bad in random.Random(name).sample(pairs, per_phenomenon):
                items.append({"sentence_good": good, "sentence_bad": bad, "phenomenon": name, "field": field})
    return items
