"""Vocabulary for the task generators: common words, greetings and filler sentences."""

from __future__ import annotations

_COMMON = """
acme amber anchor apple april arrow atlas autumn bakery barrel basket beacon bergen berlin birch bloom blue
bolt boston bottle branch bread breeze brick bridge bronze brook bruges cairo candle canvas carbon cargo
castle cedar chain chair cherry cider circle cliff clock cloud clover cobalt coffee copper coral cotton
crane creek crown crystal daisy delta denver desert dove dragon drum dublin eagle earth easel echo elm ember
engine falcon farm feather fern field fig finch fire flag flint flower forest fox frost garden gate geneva
ginger glass globe gold grain granite green grove hammer harbor harvest hawk hazel hill honey horizon horse
house indigo iris iron island ivory jade jasmine jet jungle juniper kettle key kite kyoto ladder lake lamp
lantern laurel leaf lemon light lily lima linen lion lisbon london lotus lunar madrid maple marble meadow
metal milan mill mint mirror moon moss mountain music needle nest night north nova oak oasis ocean olive
onyx opal orange orbit orchid oslo otter owl palm paper paris pear pearl pebble pepper pilot pine planet
plum polar pond poppy porto prague quartz queen quill quiet rabbit rain raven red reef ridge river robin
rocket rome rose ruby sage sail salt sand sea seed shadow shell silk silver sky smith snow solar spark
spring star steel stone storm summer sun swan table tango tea thunder tide tiger tile timber tokyo tools
tower trade train tulip turin union urban valley velvet vienna violet vista wagon warsaw water wave wheat
whale wheel white willow wind winter wolf wood yarn yellow york zebra zen zurich
"""
COMMON_WORDS: tuple[str, ...] = tuple(_COMMON.split())

GREETINGS: tuple[str, ...] = (
    "please ",
    "please ",
    "Please ",
    "hi, ",
    "hello, ",
    "ok, ",
    "now ",
    "hi, please ",
    "",
)

FILLERS: tuple[str, ...] = (
    "Good morning. ",
    "Hello there! ",
    "I have a small task for you. ",
    "This one is for the report. ",
    "Thanks for your help so far. ",
    "Here is the next one. ",
    "Only the answer, no comment. ",
    "The client is waiting for it. ",
    "It should not take long. ",
    "We had a long day here. ",
)
