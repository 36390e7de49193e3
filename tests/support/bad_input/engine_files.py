"""DeepSpeed's JSON."""

# ruff: noqa: E501 - tables

from tests.support.bad_input.case import Box, Case


def engine(content: str | bytes):
    return lambda box: box.train("--deepspeed", str(box.write("engine.json", content)))


def folder(box: Box) -> list[str]:
    return box.train("--deepspeed", str(box.folder))


CASES = [
    Case("no such DeepSpeed file", lambda box: box.train("--deepspeed", "no/such.json"), "deepspeed: there is no file ..."),
    Case("a folder as DeepSpeed file", folder, "deepspeed: there is no file ..."),
    Case("a DeepSpeed file that is cut", engine('{"zero_optimization": {'), "is not valid JSON: ..."),
    Case("a DeepSpeed file in UTF-16", engine("{}".encode("utf-16")), "is not valid JSON: ..."),
    Case("a DeepSpeed file of 100,000 brackets", engine("[" * 100_000), "is not valid JSON: ..."),
    Case("a DeepSpeed file with a number of 5,000 digits", engine('{"gradient_clipping": ' + "1" * 5000 + "}"),
         "is not valid JSON: ..."),
    Case("a DeepSpeed key twice", engine('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}'),
         "is not valid JSON: the key ... appears twice"),
    Case("a DeepSpeed file of two megabytes", engine(" " * 2**21 + "{}"), "is not valid JSON: it has more than ... bytes"),
    Case("a list as DeepSpeed file", engine("[1]"), "must hold an object, not a ..."),
    Case("an unknown DeepSpeed key", engine('{"zero_optimisation": {}}'), "unknown key ...; did you mean ..."),
    Case("an optimizer in the DeepSpeed file", engine('{"optimizer": {"type": "Adam"}}'),
         "belongs to ...; remove it from the DeepSpeed file"),
    Case("another batch size than the recipe's", engine('{"train_micro_batch_size_per_gpu": 64}'), '... is ..., but ... makes it ...; write "auto"'),
    Case("ZeRO stage 4", engine('{"zero_optimization": {"stage": 4}}'), "zero_optimization.stage is ...; accepted: 0, 1, 2, 3"),
    Case("a ZeRO stage that is not a number", engine('{"zero_optimization": {"stage": NaN}}'), "zero_optimization.stage is ..."),
    Case("a ZeRO option of the wrong type", engine('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}'),
         "deepspeed: zero_optimization.reduce_bucket_size is ...: Input should be a valid integer"),
]  # fmt: skip
