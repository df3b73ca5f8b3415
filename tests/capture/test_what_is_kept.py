"""Nothing of a model is kept after a call: memory does not grow, and no reference is left."""

import textwrap

import clean_process

pytestmark = clean_process.in_one_group

# 50 models of 4 MB; each kind of call in turn, so that a leak of any of them is ten models.
GROWTH = textwrap.dedent("""
    import gc, os, sys, tempfile
    import psutil, torch
    from torch import nn
    import adaptive_tangents as at

    torch.set_num_threads(1)
    x = torch.randn(2, 256)


    def made():
        return nn.Sequential(nn.Linear(256, 2000, bias=False), nn.Tanh(), nn.Linear(2000, 256, bias=False), nn.Linear(256, 1))


    def trained(model):
        adaptive = at.TangentModule(model, at.Fixed())
        optimizer = torch.optim.SGD(adaptive.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            adaptive(x).square().sum().backward()
            optimizer.step()


    def averaged(model):
        end = {name: value + 0.01 for name, value in model.state_dict().items()}
        at.average_features(model, model.state_dict(), end, x, nodes=1)


    def stored(model):
        with tempfile.TemporaryDirectory() as folder:
            at.kernel_to_store(model, x, folder + "/K.zarr", outputs="trace")


    def fitted(model):
        feats = at.tangent_features(model, x)
        at.fit(feats, torch.ones(2, 1), structure=at.Fixed(), ridge=0.1).predict(feats)


    calls = [lambda m: at.tangent_kernel(m, x, params=m.state_dict()), fitted, averaged, stored, trained]


    def rss():
        gc.collect()
        return psutil.Process().memory_info().rss


    for call in calls * 2:
        call(made())
    size = sum(p.nbytes for p in made().parameters())
    for _ in range(3):  # the allocator may settle later, but what leaks does so every time
        before = rss()
        for k in range(50):
            calls[k % 5](made())
        grown = (rss() - before) / size
        if grown < 1:
            break
    print(grown)
""")


def test_fifty_captures_of_models_that_are_gone_grow_by_less_than_one_model() -> None:
    made = clean_process.run(GROWTH)
    assert made.returncode == 0, made.stderr
    assert float(made.stdout.split()[-1]) < 1, made.stdout


# The type checks of the tests keep what a function closes over, so this runs in a process without them.
REFERENCES = textwrap.dedent("""
    import gc, tempfile, weakref
    import torch
    from torch import nn
    import adaptive_tangents as at


    class Kept(nn.Module):
        # Uses of many kinds, among them a Function of its own, a lookup and a block that is made sample by sample.
        def __init__(self):
            super().__init__()
            self.table, self.attend = nn.Embedding(5, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.filter, self.last = nn.Conv1d(4, 4, 2), nn.Linear(4, 2)
            self.odd = nn.Parameter(torch.ones(4))
            self.register_buffer("scale", torch.ones(4))

            class Doubled(torch.autograd.Function):
                @staticmethod
                def forward(ctx, h):
                    return h * 2

                @staticmethod
                def backward(ctx, signal):
                    return signal * 2

            self.doubled = Doubled

        def forward(self, x):
            h = self.table(x)
            h = self.filter(self.attend(h, h, h)[0].mT).mean(-1)
            out = self.last(torch.erf(self.doubled.apply(h)) * self.odd.cumsum(0) * self.scale)
            gone.append(weakref.ref(out))
            return out


    def trained(model):
        adaptive = at.TangentModule(model, at.Fixed())
        adaptive(x).square().sum().backward()
        return adaptive


    def averaged(model):
        start = dict(model.state_dict())
        end = {name: value + (0.01 if name != "scale" else 0) for name, value in start.items()}
        return at.average_features(model, start, end, x, nodes=1)


    def refused(model):
        try:
            at.tangent_features(model, x, output_fn=lambda out: out[0])
        except at.TangentError:
            return True


    def stored(model):
        with tempfile.TemporaryDirectory() as folder:
            return at.kernel_to_store(model, x, folder + "/K.zarr", outputs="trace", dtype=torch.float32)


    calls = {
        "tangent_features": lambda model: at.tangent_features(model, x),
        "tangent_kernel": lambda model: at.tangent_kernel(model, x, x2=x[:2], tile=2),
        "fit": lambda model: at.fit(at.tangent_features(model, x), torch.ones(4, 2), ridge=0.1, structure=at.Fixed()),
        "average_features": averaged, "kernel_to_store": stored, "plan_kernel": lambda model: at.plan_kernel(model, x),
        "TangentModule": trained, "an error": refused,
    }
    x = torch.randint(0, 5, (4, 3))
    gone = []


    def left(call):
        model = Kept().double().eval()
        gone[:] = map(weakref.ref, (*model.modules(), *model.parameters()))
        result = call(model)  # what a call returns may not hold the model either
        del model
        for _ in range(3):
            gc.collect()
        return result is not None, sum(ref() is not None for ref in gone)


    for name, call in calls.items():
        made, kept = left(call)
        print(name, made, kept, len(gone))
        assert made and not kept and len(gone) > 12, (name, made, kept, len(gone))
""")


def test_no_reference_to_a_model_its_parameters_or_outputs_is_left() -> None:
    made = clean_process.run(REFERENCES)
    assert made.returncode == 0, made.stdout + made.stderr
