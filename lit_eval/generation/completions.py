"""Prompts with known completions, in German and English, by category; and groups of prompts that mean the same.

Written for this project. An answer is one word; several are separated by `/`. The completions have not been validated
with speakers: read the numbers of a category as a comparison between models.
"""

from __future__ import annotations

from typing import NamedTuple

Language = str


class Completion(NamedTuple):
    """A prompt whose next word is known."""

    prompt: str
    answers: tuple[str, ...]
    """Words that count as right, the first of them the expected one."""
    category: str
    language: Language


_COMPLETIONS: dict[Language, dict[str, str]] = {
    "en": {
        "opposites": """
            The opposite of hot is | cold
            The opposite of big is | small/little
            The opposite of old is | young/new
            The opposite of up is | down
            The opposite of left is | right
            If it is not open, it is | closed/shut
            If the glass is not full, it is | empty
            She is not sad today, she is | happy/glad
            The stone is not light but | heavy
            The road is not short but | long
            It was not loud in the house, it was | quiet/silent
            He did not lose the game; he | won""",
        "sequences": """
            Monday, Tuesday, | Wednesday
            Friday, Saturday, | Sunday
            January, February, | March
            October, November, | December
            one, two, three, | four
            seven, eight, nine, | ten
            ten, twenty, | thirty
            first, second, | third
            spring, summer, autumn and | winter
            morning, noon and | night/evening
            yesterday, today and | tomorrow
            a, b, c, | d""",
        "colours": """
            In summer the grass is | green
            Fresh snow is | white
            A ripe lemon is | yellow
            Blood is | red
            Coal is | black
            On a clear day the sky is | blue
            A bar of chocolate is | brown
            An elephant is big and | grey/gray
            If you mix red and white, you get | pink
            If you mix blue and yellow, you get | green
            If you mix black and white, you get | grey/gray
            The yolk of an egg is | yellow""",
        "animals": """
            The young of a dog is called a | puppy
            The young of a cat is called a | kitten
            The young of a cow is called a | calf
            The young of a sheep is called a | lamb
            The young of a horse is called a | foal
            Milk comes from a | cow
            Wool comes from a | sheep
            Eggs are laid by a | hen/chicken
            Honey is made by a | bee
            A web is spun by a | spider
            The animal with the very long neck is the | giraffe
            The animal with the long trunk is the | elephant""",
        "things": """
            We cut bread with a | knife
            We eat soup with a | spoon
            We open a lock with a | key
            We drive a nail into the wall with a | hammer
            At night we sleep in a | bed
            When it rains we open an | umbrella
            We see with our | eyes
            We hear with our | ears
            We write on paper with a | pen/pencil
            We tell the time by looking at a | clock/watch
            A house is locked by closing its | door
            We buy bread at the | bakery/baker""",
        "grammar": """
            One child plays, two children | play
            One bird sings, two birds | sing
            Today I go, yesterday I | went
            Today I see it, yesterday I | saw
            Today I write, yesterday I | wrote
            One mouse, two | mice
            One foot, two | feet
            One child, two | children
            This bag is good, that bag is | better
            The coat belongs to me; it is | mine
            The coat belongs to her; it is | hers
            I am, you are, he | is""",
    },
    "de": {
        "opposites": """
            Das Gegenteil von heiß ist | kalt
            Das Gegenteil von groß ist | klein
            Das Gegenteil von alt ist | jung/neu
            Das Gegenteil von oben ist | unten
            Das Gegenteil von links ist | rechts
            Das Gegenteil von hell ist | dunkel
            Wenn die Tür nicht offen ist, ist sie | geschlossen/zu
            Wenn das Glas nicht voll ist, ist es | leer
            Sie ist heute nicht traurig, sondern | fröhlich/froh/glücklich
            Der Stein ist nicht leicht, sondern | schwer
            Der Weg ist nicht kurz, sondern | lang
            Im Haus war es nicht laut, sondern | leise/still/ruhig""",
        "sequences": """
            Montag, Dienstag, | Mittwoch
            Freitag, Samstag, | Sonntag
            Januar, Februar, | März
            Oktober, November, | Dezember
            eins, zwei, drei, | vier
            sieben, acht, neun, | zehn
            zehn, zwanzig, | dreißig
            erstens, zweitens, | drittens
            Frühling, Sommer, Herbst und | Winter
            am Morgen, am Mittag und am | Abend
            gestern, heute und | morgen
            a, b, c, | d""",
        "colours": """
            Im Sommer ist das Gras | grün
            Frischer Schnee ist | weiß
            Eine reife Zitrone ist | gelb
            Blut ist | rot
            Kohle ist | schwarz
            An einem klaren Tag ist der Himmel | blau
            Schokolade ist meistens | braun
            Ein Elefant ist groß und | grau
            Aus Rot und Weiß mischt man | Rosa
            Aus Blau und Gelb mischt man | Grün
            Aus Schwarz und Weiß mischt man | Grau
            Das Innere eines Eis ist weiß und | gelb""",
        "animals": """
            Das Junge einer Kuh heißt | Kalb
            Das Junge eines Schafs heißt | Lamm
            Das Junge eines Pferdes heißt | Fohlen
            Das Junge eines Hundes heißt | Welpe
            Das Junge eines Huhns heißt | Küken
            Milch bekommen wir von der | Kuh
            Wolle bekommen wir vom | Schaf
            Eier legt das | Huhn
            Honig macht die | Biene
            Ein Netz spinnt die | Spinne
            Das Tier mit dem sehr langen Hals ist die | Giraffe
            Das Tier mit dem langen Rüssel ist der | Elefant""",
        "things": """
            Brot schneidet man mit einem | Messer
            Suppe isst man mit einem | Löffel
            Ein Schloss öffnet man mit einem | Schlüssel
            Einen Nagel schlägt man mit einem | Hammer
            Nachts schlafen wir in einem | Bett
            Wenn es regnet, öffnen wir einen | Schirm/Regenschirm
            Wir sehen mit den | Augen
            Wir hören mit den | Ohren
            Auf Papier schreibt man mit einem | Stift/Bleistift
            Wie spät es ist, sagt uns die | Uhr
            Bevor wir das Haus verlassen, schließen wir die | Tür
            Brötchen kauft man beim | Bäcker""",
        "grammar": """
            Ein Kind spielt, zwei Kinder | spielen
            Ein Vogel singt, zwei Vögel | singen
            Heute gehe ich, gestern | ging
            Heute sehe ich es, gestern | sah
            Heute schreibe ich, gestern | schrieb
            Eine Maus, zwei | Mäuse
            Ein Fuß, zwei | Füße
            Ein Haus, zwei | Häuser
            Diese Tasche ist gut, jene ist | besser
            Der Mantel gehört mir; es ist | meiner/mein
            Ich bin, du bist, er | ist
            Ich habe, du hast, er | hat""",
    },
}

# Each line: one thing said in three ways, so that a continuation of one is a continuation of the others.
_PARAPHRASES: dict[Language, str] = {
    "en": """
        In the morning the old man went to | At dawn the old man walked to | Early that day the old man set out for
        The girl was happy because | The girl was glad because | What made the girl happy was that
        When the storm began, the sailors | As the storm broke, the sailors | At the start of the storm the sailors
        My grandmother always told me that | My grandmother used to say that | Grandmother would always say that
        For dinner we had | In the evening we ate | Our supper that day was""",
    "de": """
        Am Morgen ging der alte Mann | In der Frühe ging der alte Mann | Früh am Tag ging der alte Mann
        Das Mädchen freute sich, weil | Das Mädchen war froh, weil | Das Mädchen war glücklich, weil
        Als der Sturm begann, liefen die Matrosen | Als der Sturm losbrach, rannten die Matrosen | Im Sturm liefen sie
        Meine Großmutter sagte immer, dass | Meine Großmutter hat immer gesagt, dass | Großmutter meinte immer, dass
        Zum Abendessen gab es | Am Abend aßen wir | Auf dem Tisch stand am Abend""",
}


def completions() -> list[Completion]:
    """All prompts with known completions."""
    found = []
    for language, categories in _COMPLETIONS.items():
        for category, lines in categories.items():
            for line in lines.strip().splitlines():
                prompt, _, answers = line.strip().partition(" | ")
                found.append(Completion(prompt, tuple(answers.split("/")), category, language))
    return found


def paraphrases() -> list[tuple[Language, tuple[str, ...]]]:
    """Groups of prompts that mean the same."""
    return [
        (language, tuple(line.strip().split(" | ")))
        for language, lines in _PARAPHRASES.items()
        for line in lines.strip().splitlines()
    ]


def open_prompts() -> list[str]:
    """Prompts that any text may follow: the paraphrases, in both languages."""
    return [prompt for _, group in paraphrases() for prompt in group]
