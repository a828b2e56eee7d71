"""Sentence patterns of the demo, written by hand: ``sentence | subject relation object; …``.

``{person}`` and ``{person2}`` are two people; ``{They}``, ``{they}`` and ``{their}`` stand for `person`. The patterns
asked about were written apart from those learnt: other verbs, other orders, other ways to join facts.
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
{company} was started in {city} by {person}. | company location city; company founder person
It was {person} who set {company} on its feet. | company founder person
With {person2}'s help, {person} founded {company} in {year}. | company founder person; company year year
{company} traces its beginnings to {year}. | company year year
{company} grew out of a workshop that {person} ran. | company founder person
{person} made {company} out of nothing. | company founder person
{company}, established by {person}, employs {person2}. | company founder person; person2 employer company
The {group} was formed by {person} {aside}. | group founder person
{person} gathered friends and founded the {group}. | group founder person
{person} co-founded {company} with {person2}. | company founder person; company founder person2
Established in {year}, {company} belongs to {company2}. | company year year; company owner company2
{company} goes back to {person}, who was born in {city}. | company founder person; person birthplace city
{company} exists since {year}. | company year year
{person} is the founding mind behind {company}. | company founder person
{person} is originally from {city}. | person birthplace city
{person}, originally from {city}, is employed by {company}. | person birthplace city; person employer company
{person}'s place of birth is {city}. | person birthplace city
{city} is where {person} was born. | person birthplace city
Records show that {person} was born in {city}. | person birthplace city
Like many painters, {person} comes from {city}. | person birthplace city
The writer {person}, from {city}, published {book} in {year}. | person birthplace city; book author person; book year year
{person}, {city}-born, discovered {discovery}. | person birthplace city; discovery discoverer person
{person} was raised in {city2}, although born in {city}. | person birthplace city
{person} left {city}, the town of {their} birth, to join the {team}. | person birthplace city; person team team
The house in {city} where {person} was born is now a shop. | person birthplace city
{person}, who hails from {city}, is in the {group}. | person birthplace city; group member person
In {country}, the capital {city} is also the largest town. | country capital city
{city} is a quiet town for the capital of a country like {country}. | country capital city
{city} serves {country} as capital and {company} as home. | country capital city; company location city
The seat of government of {country} is its capital, {city}. | country capital city
Since the war, {country} has had {city} as its capital. | country capital city
{person} moved to {city}, capital of {country}, {aside}. | country capital city
Capital of {country} since {year}, {city} is growing. | country capital city
The king of {country} lives in the capital, which is {city}. | country capital city
What {city} is to {country}, {city2} is to {country2}: the capital. | country capital city; country2 capital city2
The {landmark} is in {city}, capital of {country}. | landmark location city; country capital city
{city} was chosen as the capital of {country}. | country capital city
{book} is the work of {person}. | book author person
{book} is a collection of poems by {person}. | book author person
{person} spent ten years writing {book}. | book author person
The book {book}, by {person}, was first printed in {year}. | book author person; book year year
{book}, which {person} wrote {aside}, sold well. | book author person
It took {person} a summer to write {book}. | book author person
{person} is best known for the novel {book}. | book author person
As an author, {person} is remembered for {book}. | book author person
{person}'s novel {book} was published in {year}. | book author person; book year year
{person}'s first book was {book}, followed by {book2}. | book author person; book2 author person
The {year} novel {book} was written by {person}. | book year year; book author person
Penned by {person}, {book} was released in {year}. | book author person; book year year
{book} and {book2} are both by {person}. | book author person; book2 author person
People still read {book}, a story by {person}. | book author person
{person}, who wrote {book}, comes from {city}. | book author person; person birthplace city
{person} has a post at {company}. | person employer company
{person} earns a wage as a driver for {company}. | person employer company
{person} is on the staff of {company}. | person employer company
{company}'s staff includes {person}. | person employer company
{person} has worked at {company} since {year}. | person employer company
{person} is paid by {company} to answer letters. | person employer company
{person} and {person2} work for {company}. | person employer company; person2 employer company
The manager of {company}'s shop in {city} is {person}. | person employer company
At {company}, {person} repairs engines. | person employer company
{person} found work with {company}, a firm from {city}. | person employer company; company location city
{company} pays {person}, and {company2} pays {person2}. | person employer company; person2 employer company2
A clerk named {person} works at {company}. | person employer company
{person}, employed at {company}, belongs to the {group}. | person employer company; group member person
{person} wed {person2} {aside}. | person spouse person2
{person} has been married to {person2} since {year}. | person spouse person2
{person} and {person2} got married in {city}. | person spouse person2
The wedding of {person} and {person2} was held in {city}. | person spouse person2
{person}, married to {person2}, plays for the {team}. | person spouse person2; person team team
{person2} is the spouse of {person}. | person2 spouse person
The couple, {person} and {person2}, met at {company}. | person spouse person2
{person} shares {their} life with {person2}, whom {they} married in {year}. | person spouse person2
{person} said yes, and so {person2} became {their} spouse. | person spouse person2
{person2}'s marriage to {person} was a happy one. | person2 spouse person
{person}, founder of {company}, married {person2}. | company founder person; person spouse person2
{person}'s team is the {team}. | person team team
{person} is a player of the {team}. | person team team
{person} runs on the wing for the {team} and lives in {city}. | person team team
The best player of the {team} is called {person}. | person team team
The {team} count on {person} in goal. | person team team
{person} wears number ten for the {team}. | person team team
{person}, who plays for the {team}, wrote {book}. | person team team; book author person
On Sunday {person} will play for the {team} again. | person team team
{person} moved from {city} to join the {team} as a player. | person team team
The {team} beat the {team2} when {person} of the {team} scored. | person team team
With {person} and {person2} in the side, the {team} won. | person team team; person2 team team
{person} is under contract with the {team}. | person team team
{discovery} is a discovery of {person}. | discovery discoverer person
{person} is credited with the discovery of {discovery}. | discovery discoverer person
The first person to see {discovery} was {person}. | discovery discoverer person
{discovery} was first described by {person} in {year}. | discovery discoverer person; discovery year year
Nobody knew of {discovery} until {person} discovered it. | discovery discoverer person
{person} came across {discovery} in {year}. | discovery discoverer person; discovery year year
Science knows {discovery} thanks to {person}. | discovery discoverer person
{discovery} bears no name but that of its discoverer, {person}. | discovery discoverer person
Working for {company}, {person} identified {discovery}. | person employer company; discovery discoverer person
In {year} {discovery} was discovered. | discovery year year
{person} and {person2} discovered {discovery}. | discovery discoverer person; discovery discoverer person2
{company} sits in {city}. | company location city
{company} can be found in {city}. | company location city
In {city}, the {landmark} draws crowds. | landmark location city
The {landmark} of {city} was finished in {year}. | landmark location city; landmark year year
{city} is the home of {company}. | company location city
The {landmark}, in the heart of {city}, is closed on Mondays. | landmark location city
From {city}, {company} ships its goods abroad. | company location city
The head office of {company} lies in {city}. | company location city
Built in {year}, the {landmark} is a pride of {city}. | landmark year year; landmark location city
Travellers pass the {landmark} when they enter {city}. | landmark location city
{company}, located in {city}, dates back to {year}. | company location city; company year year
The {landmark} dates back to {year}. | landmark year year
{person} visited the {landmark} in {city}. | landmark location city
{person} sings in the {group}. | group member person
{person} was accepted as a member of the {group} {aside}. | group member person
Membership of the {group} was offered to {person}, who accepted. | group member person
Among the members of the {group} is {person}, born in {city}. | group member person; person birthplace city
{person} plays drums for the {group}. | group member person
The {group} consists of {person} and {person2}. | group member person; group member person2
{person} has been part of the {group} since {year}. | group member person
One of the {group} is {person}, who works for {company}. | group member person; person employer company
{person}, {person2} and others make up the {group}. | group member person; group member person2
{company} was acquired by {company2}. | company owner company2
{company2} acquired the {landmark} in {city}. | landmark owner company2; landmark location city
{company}'s owner is {company2}. | company owner company2
{company2} is the parent of {company}. | company owner company2
{company} is part of {company2}. | company owner company2
{company} has been in the hands of {company2} since {year}. | company owner company2
{company2} holds all shares of {company}, founded by {person}. | company owner company2; company founder person
The {landmark} was sold to {company}. | landmark owner company
{company} paid for the {landmark} and owns it now. | landmark owner company
{company2} has {company} as a daughter company. | company owner company2
{person} was born in {city}. {Their} employer is {company}. | person birthplace city; person employer company
{person} is a member of the {group}. {They} also wrote {book}. | group member person; book author person
{company} is located in {city}. {company2} owns it. | company location city; company owner company2
The {landmark} stands in {city}. It was built in {year}. | landmark location city; landmark year year
{person} married {person2}. Both play for the {team}. | person spouse person2; person team team; person2 team team
{person} founded {company}. In {year} {they} wrote {book}. | company founder person; book author person; book year year
{discovery} was found in {year}. Its discoverer was {person}. | discovery year year; discovery discoverer person
{city} is the capital of {country}. {person} was born there. | country capital city; person birthplace city
{person} works for {company}, {person2} for {company2}. | person employer company; person2 employer company2
{company} was founded by {person}, is based in {city} and is owned by {company2}. | company founder person; company location city; company owner company2
{person} plays for the {team}, and {person2}, {their} spouse, works for {company}. | person team team; person spouse person2; person2 employer company
The {landmark} is in {city}, the {landmark2} in {city2}. | landmark location city; landmark2 location city2
It rained all day in {city} and the market stayed empty. |
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
