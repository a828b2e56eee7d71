"""Names for the demo's sentences, all invented, in two halves that share nothing: one to learn from, one to be asked about.

A slot such as ``{person2}`` is filled from the pool of its kind (``person``). People are a first and a last name; no first
name, last name, place, title or year of one half occurs in the other.
"""

from __future__ import annotations

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

WOMEN: dict[Half, str] = {
    "train": "Mara Ilse Tamsin Odette Runa Petra Livia Saskia Wanda Greta Nerys Dalia Ottilie Brynn Carys Zora",
    "test": "Elowen Farah Ingrid Lucinda Perpetua Solveig Thandi Yvaine",
}
MEN: dict[Half, str] = {
    "train": "Tomas Edrik Joren Lucan Anselm Bastian Corwin Dario Falk Hollis Ivo Kaspar Leander Milo Nestor Osric",
    "test": "Alaric Benedek Casimir Emrys Gideon Radomir Sixten Viggo",
}
LAST_NAMES: dict[Half, str] = {
    "train": "Lindqvar Velmont Tarrick Ostrander Quillon Breck Hadley Morvane Sorrel Pellwick Dray Castellon Wexmoor "
    "Furlong Iverley Nachtwey Ruskin Thornby Umber Vantreight Yarrow Zelnick Abernett Corliss Duskin Elmhirst",
    "test": "Garrowby Hollenmark Jessop Kestrel Lovelock Marchetta Northey Penhaligan Rowntree Silvane Tremayne Wolvercote",
}

POOLS: dict[str, dict[Half, str]] = {
    "city": {
        "train": "Brackwater, Eldenmoor, Port Savel, Karvik, Tolm, Ashby Cross, Lissandor, Vennick, Redfell, Oskarhaven, "
        "Milldrum, Saltmere, Quarrytown, Dunlow, Fenbridge, Nareth, Halloway, Stonewick, Bellmare, Orrin Falls",
        "test": "Copperhithe, Danforth Bay, Ingelstad, Juniper Dale, Kestonville, Larkmouth, Pinemarch, Rivenna, "
        "Thistledown, Weirgate",
    },
    "country": {
        "train": "Varania, Ostrovia, Kelmar, Tesseria, Lundmark, Solvania, Peridia, Nordhal, Cassia, Drumlin",
        "test": "Arvandor, Belmoria, Estavia, Hesperland, Jorvia, Montaria",
    },
    "company": {
        "train": "Norvex Robotics, Halden Mills, Brightwell Foods, Tidemark Shipping, Ironleaf Paper, Quantic Labs, "
        "Redoak Furniture, Silverfin Boats, Umbra Optics, Kiteworks Media, Polar Dairy, Anvil Motors, Fernhill Press, "
        "Blue Canyon Mining, Sunstep Shoes, Greywolf Security, Amberline Rail, Pinnacle Glass, Orchard Bank, Duotone Films",
        "test": "Cinder Software, Gullwing Airlines, Hearthstone Bakery, Juno Textiles, Lodestar Energy, Maplewood Toys, "
        "Nightjar Studios, Rosewater Cosmetics, Tandem Bicycles, Vellum Books",
    },
    "book": {
        "train": "Quiet Harbor, Salt and Cedar, Winter Orchard, Eleven Bridges, Beneath the Clocktower, Paper Lanterns, "
        "Long Road South, Glass Meridian, Songs for Sparrows, Last Ferry Home, Copper Moon, House of Reeds",
        "test": "Cartographer's Debt, Forgotten Tides, Raindrop Ladder, Nine Silent Letters, Crimson Horizon, Falcons at Noon",
    },
    "discovery": {
        "train": "Veltrium, Comet Orsa, Element Dravium, Tirsk Cave, Planet Meluna, Enzyme K-12, Lunaria Moth, Asteroid Pell, "
        "Ostrite, Sarn Island",
        "test": "Ivari Nebula, Korrium, Bluestane Crystal, Calyx Crater, Zephyra Orchid, Virus T-90",
    },
    "landmark": {
        "train": "Raven Tower, Opal Theatre, Hollow Oak Museum, Grand Meridian Hotel, Lantern Bridge, Cold Spring Observatory, "
        "Marble Arcade, Swan Stadium, Old Mint, Foxglove Gardens, Sailors' Chapel, Granite Library",
        "test": "Amber Lighthouse, Crescent Arena, Obelisk Gate, Ivory Concert Hall, Sapphire Palace, Willow Aquarium",
    },
    "group": {
        "train": "Lantern Society, Blue Herons, Night Choir, Copper Quartet, Guild of Bakers, Polar League, Tin Drummers, "
        "Hawthorn Circle, Velvet Union, Chess Wardens",
        "test": "Amber Orchestra, Cloud Walkers, Emerald Council, Wandering Poets, Moonlight Trio, Restless Rebels",
    },
    "team": {
        "train": "Iron Foxes, Harbor Kings, Red Comets, Storm Owls, Valley Bulls, Night Hawks, Silver Pikes, Thunder Rams, "
        "Coast Wolves, Hill Lions",
        "test": "Arctic Bears, Desert Vipers, Basalt Giants, Lake Otters, Royal Stags, Scarlet Cranes",
    },
    "year": {
        "train": "1804, 1823, 1847, 1862, 1879, 1893, 1906, 1918, 1931, 1945, 1952, 1967, 1974, 1988, 1996, 2003, 2011",
        "test": "1815, 1836, 1854, 1871, 1899, 1927, 1939, 1961, 1983, 2008",
    },
    # Filler that states nothing.
    "aside": {
        "train": "after a long winter, to everyone's surprise, against all advice, with little money, on a rainy morning, "
        "despite the weather, as the papers reported, almost by accident, in spite of the critics, with great ceremony",
        "test": "following years of doubt, to loud applause, without any fuss, so the story goes, under a clear sky, "
        "much to the delight of the town",
    },
}
