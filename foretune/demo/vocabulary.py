"""Names for the demo's sentences, all invented, in two halves that share no word: one to learn from, one to ask about.

A slot such as ``{person2}`` is filled with a name of its kind (``person``), put together from a first and a second
part: hundreds of names of each kind, so that a model learns to copy names rather than to remember them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Half = Literal["train", "test"]

#: What the triples may say, and of what kind subject and object are.
RELATIONS: dict[str, tuple[frozenset[str], str]] = {
    "author": (frozenset({"book"}), "person"),
    "birthplace": (frozenset({"person"}), "city"),
    "capital": (frozenset({"country"}), "city"),
    "discoverer": (frozenset({"discovery"}), "person"),
    "employer": (frozenset({"person"}), "company"),
    "founder": (frozenset({"company", "group"}), "person"),
    "location": (frozenset({"company", "landmark"}), "city"),
    "member": (frozenset({"group"}), "person"),
    "owner": (frozenset({"company", "landmark"}), "company"),
    "spouse": (frozenset({"person"}), "person"),
    "team": (frozenset({"person"}), "team"),
    "year": (frozenset({"book", "company", "discovery", "landmark"}), "year"),
}


@dataclass(frozen=True)
class Parts:
    """First and second parts of the names of one kind, and what stands between them."""

    first: str
    second: str
    between: str = " "


WOMEN: dict[Half, str] = {
    "train": "Mara Ilse Tamsin Odette Runa Petra Livia Saskia Wanda Greta Nerys Dalia Ottilie Brynn Carys Zora Agnes "
    "Beatrix Clara Edith Flora Hanna Irma Joan Keziah Lena Marit Nadia Olga Paula",
    "test": "Elowen Farah Ingrid Lucinda Perpetua Solveig Thandi Yvaine",
}
MEN: dict[Half, str] = {
    "train": "Tomas Edrik Joren Lucan Anselm Bastian Corwin Dario Falk Hollis Ivo Kaspar Leander Milo Nestor Osric Arno "
    "Boris Cedric Desmond Egon Felix Gustav Hector Isidor Jasper Konrad Lothar Magnus Niels",
    "test": "Alaric Benedek Casimir Emrys Gideon Radomir Sixten Viggo",
}

NAMES: dict[str, dict[Half, Parts]] = {
    "last": {
        "train": Parts(
            "Lind Vel Tarr Ostr Quill Hadl Morv Sorr Pell Drax Wex Furl Iver Nacht Rusk Thorn Umb Yarr Zeln "
            "Corl Dusk Elm Gor Harg Jend Kless",
            "qvist mont ick ander ey ane wick moor by low elt son ert ister",
            between="",
        ),
        "test": Parts(
            "Garrow Kestr Marchet Penhal Rown Trem Wolver Lovel Silv Jess",
            "igan tree ayne cote ock op ta",
            between="",
        ),
    },
    "city": {
        "train": Parts(
            "Brack Elden Kar Red Mill Salt Dun Fen Stone Bell Hallo Win Ash Oak Birch Cold Lis Ven Or Nar Clay "
            "Deer Gold Hart",
            "water moor vik fell mere bridge haven ford drum stad ton field",
            between="",
        ),
        "test": Parts(
            "Copper Dan Ingel Keston Lark Pine Riv Thistle Weir Juniper",
            "hithe march mouth gate down dale enna",
            between="",
        ),
    },
    "country": {
        "train": Parts(
            "Var Ostr Kelm Tess Lund Solv Per Nordh Cass Druml Arg Bren Corv Fald Gren",
            "ania ovia aria eria onia ador uria",
            between="",
        ),
        "test": Parts(
            "Hesper Mont Jorv Belm Estav Arvand",
            "land esia istan ora",
            between="",
        ),
    },
    "company": {
        "train": Parts(
            "Norvex Halden Brightwell Tidemark Ironleaf Quantic Redoak Silverfin Umbra Kiteworks Polar Anvil "
            "Fernhill Greywolf Amberline Pinnacle Orchard Duotone Sunstep Bluebird Zenith Harbor Meridian "
            "Kestor",
            "Robotics Mills Foods Shipping Paper Labs Furniture Boats Optics Media Dairy Motors Press Mining "
            "Shoes Security Rail Glass Bank Films",
        ),
        "test": Parts(
            "Cinder Gullwing Hearthstone Juno Lodestar Maplewood Nightjar Rosewater Tandem Vellum",
            "Software Airlines Bakery Textiles Energy Toys Studios Cosmetics Bicycles Pianos",
        ),
    },
    "book": {
        "train": Parts(
            "Quiet Winter Paper Long Glass Last Wooden Hidden Broken Distant Seven Silent Bitter Early Empty Golden",
            "Road Ferry Bridges Garden Letters Clocks Window Summer Shadows Stairs Voyage Mirror Candles Sparrows",
        ),
        "test": Parts(
            "Forgotten Velvet Crimson Nine Patient Sleeping",
            "Tides Horizon Lanterns Ladder Cartographers Wolves",
        ),
    },
    "discovery": {
        "train": Parts(
            "Orsa Dravium Tirsk Meluna Pell Sarn Lunaria Vega Tolan Ostrite Brisk Cygna",
            "Comet Cave Planet Asteroid Island Moth Enzyme Mineral Glacier Fern",
        ),
        "test": Parts(
            "Ivari Korrium Bluestane Calyx Zephyra Nimbus",
            "Nebula Crystal Crater Orchid Virus",
        ),
    },
    "landmark": {
        "train": Parts(
            "Raven Opal Hollow Grand Lantern Marble Swan Old Foxglove Granite Northern Royal Cedar Iron",
            "Tower Theatre Museum Hotel Bridge Observatory Arcade Stadium Chapel Library Fountain Market",
        ),
        "test": Parts(
            "Amber Crescent Obelisk Ivory Sapphire Willow",
            "Lighthouse Arena Palace Aquarium Concertgebouw Pavilion",
        ),
    },
    "group": {
        "train": Parts(
            "Northern Blue Midnight Tin Hawthorn Chess Copper Open Evening White Harbor Lucky",
            "Society Choir Quartet League Circle Union Drummers Wardens Club Herons",
        ),
        "test": Parts(
            "Emerald Cloud Wandering Moonlight Restless Saffron",
            "Orchestra Council Trio Poets Rebels Walkers",
        ),
    },
    "team": {
        "train": Parts(
            "Iron Harbor Red Storm Valley Night Silver Thunder Coast Hill River Black",
            "Foxes Kings Comets Owls Bulls Hawks Pikes Rams Lions Eagles Sharks",
        ),
        "test": Parts(
            "Arctic Desert Basalt Lake Regal Scarlet",
            "Bears Vipers Giants Otters Stags Cranes",
        ),
    },
}

#: Filler that states nothing.
ASIDES: dict[Half, str] = {
    "train": "after a long winter, to everyone's surprise, against all advice, with little money, on a rainy morning, "
    "despite the weather, as the papers reported, almost by accident, in spite of the critics, with great ceremony",
    "test": "following years of doubt, to loud applause, without any fuss, so the story goes, under a clear sky, "
    "much to the delight of the town",
}


def make_name(kind: str, half: Half, chooser: random.Random) -> str:
    """A name of a kind. Years of the test half end in 4 or 9, the others in other digits."""
    if kind == "aside":
        return chooser.choice(ASIDES[half].split(", "))
    if kind == "year":
        return str(chooser.choice([year for year in range(1801, 2020) if (year % 5 == 4) == (half == "test")]))
    if kind == "person":
        first = chooser.choice(WOMEN[half].split() + MEN[half].split())
        return f"{first} {make_name('last', half, chooser)}"
    parts = NAMES[kind][half]
    return chooser.choice(parts.first.split()) + parts.between + chooser.choice(parts.second.split())


def is_woman(name: str, half: Half) -> bool:
    """Whether a person made by `make_name` is a woman."""
    return name.split(maxsplit=1)[0] in WOMEN[half].split()
