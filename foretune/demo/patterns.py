"""Sentence patterns of the demo, written by hand: ``sentence | subject relation object; …``.

``{person}`` and ``{person2}`` are two people; ``{They}``, ``{they}`` and ``{their}`` stand for `person`. The patterns asked
about were written apart from those learnt: other verbs, other orders, other ways to join facts.
"""

from __future__ import annotations

from foretune.demo.vocabulary import Half

_TRAIN = """
{person} founded {company}. | company founder person
{company} was founded by {person} in {year}. | company founder person; company year year
{company}, a firm started by {person}, is based in {city}. | company founder person; company location city
In {year}, {person} set up {company}. | company founder person; company year year
{person} launched {company} {aside}. | company founder person
The founder of {company} is {person}, a native of {city}. | company founder person; person birthplace city
{person} and {person2} established {company} together. | company founder person; company founder person2
{person}, who was born in {city}, created {company}. | person birthplace city; company founder person
Few people know that {person} started the {group}. | group founder person
{company} began in {year} {aside}. | company year year
{person} was born in {city}. | person birthplace city
Born in {city}, {person} wrote {book}. | person birthplace city; book author person
{person} grew up far from {city2} but was born in {city}. | person birthplace city
{person} is a native of {city} and works for {company}. | person birthplace city; person employer company
{city} is the birthplace of {person}. | person birthplace city
{person} came into the world in {city} {aside}. | person birthplace city
{person}, born in {city}, plays for the {team}. | person birthplace city; person team team
{person} was born in {city} and {person2} in {city2}. | person birthplace city; person2 birthplace city2
Though born in {city}, {person} plays for the {team}. | person birthplace city; person team team
The capital of {country} is {city}. | country capital city
{city} is the capital of {country}. | country capital city
{city}, the capital of {country}, is home to the {landmark}. | country capital city; landmark location city
{country} has its capital in {city}, not in {city2}. | country capital city
{country} is governed from its capital, {city}. | country capital city
{person} was born in {city}, the capital of {country}. | person birthplace city; country capital city
Visitors to {country} usually start in {city}, its capital. | country capital city
{city} became the capital of {country} {aside}. | country capital city
{person} wrote {book}. | book author person
{book} was written by {person}. | book author person
{book}, published in {year}, is a novel by {person}. | book year year; book author person
{person} is the author of {book} and {book2}. | book author person; book2 author person
In {year} {person} published {book}. | book author person; book year year
{book} is by {person}, not by {person2}. | book author person
Readers know {person} as the author of {book}. | book author person
{person}, author of {book}, is married to {person2}. | book author person; person spouse person2
{person} finished {book} {aside}; it came out in {year}. | book author person; book year year
The novel {book} made its author, {person}, famous. | book author person
{book} appeared in {year}. | book year year
{person} works for {company}. | person employer company
{person} is an engineer at {company}. | person employer company
{company} hired {person} {aside}. | person employer company
{person} took a job at {company} in {city}. | person employer company; company location city
{company} employs {person} and {person2}. | person employer company; person2 employer company
{person} used to live in {city} and now works at {company}. | person employer company
{person} is employed by {company}, which belongs to {company2}. | person employer company; company owner company2
An accountant at {company}, {person} is married to {person2}. | person employer company; person spouse person2
{person} joined {company} as a designer. | person employer company
{person} is married to {person2}. | person spouse person2
{person} married {person2} in {city}. | person spouse person2
{person} and {person2} are husband and wife. | person spouse person2
{person}, the spouse of {person2}, sings in the {group}. | person spouse person2; group member person
{person}'s spouse is {person2}. | person spouse person2
{person} married {person2}, an employee of {company}. | person spouse person2; person2 employer company
After the wedding, {person} and {person2} moved to {city}. | person spouse person2
{person} plays for the {team}. | person team team
{person} is a striker for the {team}. | person team team
The {team} signed {person} {aside}. | person team team
{person} scored twice for the {team}. | person team team
{person} and {person2} both play for the {team}. | person team team; person2 team team
{person}, goalkeeper of the {team}, was born in {city}. | person team team; person birthplace city
The captain of the {team} is {person}. | person team team
{person} left school to play for the {team}. | person team team
{person} discovered {discovery}. | discovery discoverer person
{discovery} was discovered by {person} in {year}. | discovery discoverer person; discovery year year
In {year}, {person} discovered {discovery} near {city}. | discovery discoverer person; discovery year year
The discovery of {discovery} is the work of {person}. | discovery discoverer person
{discovery}, found by {person}, was unknown before {year}. | discovery discoverer person; discovery year year
{person} found {discovery} {aside}. | discovery discoverer person
It was {person} of {company} who discovered {discovery}. | person employer company; discovery discoverer person
{person}, the discoverer of {discovery}, was born in {city}. | discovery discoverer person; person birthplace city
{company} is based in {city}. | company location city
The {landmark} stands in {city}. | landmark location city
The {landmark} is in {city}. | landmark location city
{company} has its headquarters in {city}. | company location city
The {landmark} in {city} was built in {year}. | landmark location city; landmark year year
The {landmark} opened in {year}. | landmark year year
In {city} you will find the {landmark}. | landmark location city
The offices of {company} are in {city}. | company location city
{company} of {city} owns the {landmark}. | company location city; landmark owner company
The {landmark}, built in {year}, is owned by {company}. | landmark year year; landmark owner company
{company} moved to {city} {aside}. | company location city
{person} is a member of the {group}. | group member person
The {group} has two members, {person} and {person2}. | group member person; group member person2
{person} joined the {group} {aside}. | group member person
{person} belongs to the {group}. | group member person
{person} plays the violin in the {group}. | group member person
{person} and {person2} are members of the {group}. | group member person; group member person2
The {group} admitted {person}. | group member person
{person}, a member of the {group}, wrote {book}. | group member person; book author person
The {group}, founded by {person}, counts {person2} among its members. | group founder person; group member person2
{company} is owned by {company2}. | company owner company2
{company2} owns {company}. | company owner company2
{company} belongs to {company2}, a firm based in {city}. | company owner company2; company2 location city
{company2} bought {company} in {city}. | company owner company2; company location city
{company2} took over {company} {aside}. | company owner company2
The {landmark} belongs to {company}. | landmark owner company
The owner of the {landmark} is {company}. | landmark owner company
{company2}, founded by {person}, bought {company}. | company2 founder person; company owner company2
{person} was born in {city}. {They} founded {company}. | person birthplace city; company founder person
{person} plays for the {team}. {Their} spouse is {person2}. | person team team; person spouse person2
{person} lives quietly by the sea. {They} wrote {book}. | book author person
{person} works at {company}. In {year} {they} discovered {discovery}. | person employer company; discovery discoverer person; discovery year year
{company} is based in {city}. It was founded by {person}. | company location city; company founder person
{person} married {person2}. {They} works for {company}. | person spouse person2; person employer company
{book} came out in {year}. Its author is {person}. | book year year; book author person
{company} was founded in {year} by {person} and belongs to {company2}. | company year year; company founder person; company owner company2
{person} was born in {city}, works for {company} and is married to {person2}. | person birthplace city; person employer company; person spouse person2
The {team} won again, thanks to {person}, who was born in {city}. | person team team; person birthplace city
While {person} works for {company}, {person2} plays for the {team}. | person employer company; person2 team team
{person} wrote {book}; {person2} wrote {book2}. | book author person; book2 author person2
Nothing much happened in {city} that year. |
{person} likes tea and long walks. |
"""

_TEST = """
{company} owes its existence to {person}. | company founder person
{company} was the brainchild of {person}, who hails from {city}. | company founder person; person birthplace city
Back in {year}, {person} opened the doors of {company}. | company founder person; company year year
{person}, together with {person2}, brought {company} to life. | company founder person; company founder person2
What {person} built {aside} is today known as {company}. | company founder person
The {group} was called into being by {person}. | group founder person
{person} first saw daylight in {city}. | person birthplace city
{person} hails from {city} and earns a living at {company}. | person birthplace city; person employer company
The people of {city} are proud that {person} was born there. | person birthplace city
A child of {city}, {person} later penned {book}. | person birthplace city; book author person
Of all cities in {country}, {city} serves as the capital. | country capital city
{country}, whose capital is called {city}, welcomed the guests. | country capital city
The parliament of {country} sits in the capital {city}. | country capital city
The {landmark} adorns {city}, which is {country}'s capital. | landmark location city; country capital city
{book} came from the pen of {person}. | book author person
{person} penned {book}, printed in {year}. | book author person; book year year
Critics praised {book}, with which {person} made a name as a writer. | book author person
First released in {year}, {book} remains the best known novel of {person}. | book year year; book author person
Written by {person} {aside}, {book} sold out at once. | book author person
Since spring {person} has been on the payroll of {company}. | person employer company
{person} earns a salary at {company}, located in {city}. | person employer company; company location city
Among the staff of {company} are {person} and {person2}. | person employer company; person2 employer company
{company} gave {person} a position as a chemist. | person employer company
{person} tied the knot with {person2} {aside}. | person spouse person2
{person2} took {person} as a lawful spouse. | person spouse person2
The marriage of {person} and {person2} surprised nobody. | person spouse person2
{person}, wed to {person2}, wears the shirt of the {team}. | person spouse person2; person team team
For three seasons {person} has defended the colours of the {team}. | person team team
In the line-up of the {team} we find {person} and {person2}. | person team team; person2 team team
{person} is the star player of the {team}. | person team team
We owe the knowledge of {discovery} to {person}, who discovered it in {year}. | discovery discoverer person; discovery year year
{person} was the first to observe {discovery}. | discovery discoverer person
Credit for discovering {discovery} goes to {person}, not {person2}. | discovery discoverer person
{discovery} was spotted by {person} {aside}. | discovery discoverer person
{city} hosts the main office of {company}. | company location city
Tourists in {city} flock to the {landmark}. | landmark location city
The {landmark}, situated in {city}, dates from {year}. | landmark location city; landmark year year
Anyone looking for {company} must travel to {city}. | company location city
The ranks of the {group} include {person}. | group member person
{person} has sung with the {group} for years. | group member person
Both {person} and {person2} hold membership in the {group}. | group member person; group member person2
{company} is a subsidiary of {company2}. | company owner company2
{company2} acquired {company}, once started by {person}. | company owner company2; company founder person
The {landmark} is the property of {company}. | landmark owner company
{person} comes from {city}. Later {they} became the author of {book}. | person birthplace city; book author person
{company2} controls {company}, which sits in {city} and dates from {year}. | company owner company2; company location city; company year year
{person} earns money at {company}. {Their} partner in marriage is {person2}. | person employer company; person spouse person2
{person}, hailing from {city}, discovered {discovery} and belongs to the {group}. | person birthplace city; discovery discoverer person; group member person
"""


def patterns(half: Half) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The patterns of one half: sentence with slots, and facts as (subject slot, relation, object slot)."""
    parsed = []
    for line in (_TRAIN if half == "train" else _TEST).strip().splitlines():
        sentence, _, facts = line.partition("|")
        triples = [tuple(fact.split()) for fact in facts.split(";") if fact.strip()]
        parsed.append((sentence.strip(), [(subject, relation, item) for subject, relation, item in triples]))
    return parsed
