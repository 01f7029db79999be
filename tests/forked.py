"""Commands without the seconds of their imports: a server that has imported torch and the rest once, and forks a process for each command.

`Server` starts it, `run` is for a command what `subprocess.run` is for an interpreter. The server has no thread when it forks, or refuses. What a process reads
only when it starts cannot be set for a command (`EARLY`), and its memory begins with that of the server: tests of such things need an interpreter of their own.
"""
import json, os, signal, socket, subprocess, sys, tempfile, types
from pathlib import Path

EARLY = ('PYTHON', 'LD_', 'MALLOC_', 'GLIBC_', 'MKL_', 'OPENBLAS_', 'TORCH_', 'PYTORCH_', 'MPL', 'HF_', 'LC_', 'LANG')
SLOW = '''torch torch._dynamo torch.optim torch.func torch.distributed.run torch.distributed.tensor torch.distributed.fsdp torch.utils.data torch.utils.flop_counter
torchvision.io torchvision.transforms numpy PIL.Image matplotlib.figure matplotlib.pyplot sklearn.datasets sklearn.neighbors scipy.stats nbdev.test execnb.shell
diffusers.models.autoencoders.autoencoder_kl diffusers.models.autoencoders.autoencoder_tiny diffusers.models.transformers.dit_transformer_2d
diffusers.schedulers.scheduling_ddpm diffusers.schedulers.scheduling_ddim timm.models.vision_transformer safetensors.torch
mixmix_nb.core mixmix_nb.data mixmix_nb.models mixmix_nb.diffusion mixmix_nb.samplers mixmix_nb.speed mixmix_nb.distributed mixmix_nb.training'''.split()

def early(env): return {k: v for k,v in env.items() if k.startswith(EARLY)}

class Server:
    "The server, started at once and waiting; it imports when the first command comes, and ends with this process."
    def __init__(self, env): # the environment; what is in EARLY holds for all commands
        self.folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self.folder.name)/'socket')
        s = socket.socket(socket.AF_UNIX); s.bind(self.path); s.listen(64)
        self.p = subprocess.Popen([sys.executable, __file__, str(s.fileno())], pass_fds=[s.fileno()], start_new_session=True, cwd='/',
                                  env=env|dict(OMP_NUM_THREADS='1', FORKED_EARLY=json.dumps(early(env))), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        s.close()
    def close(self): self.p.stdin.close(); self.p.wait(); self.folder.cleanup()

def run(path, # of the server's socket
        args, # arguments of the interpreter: `-m module …`, `-c code …` or `file …`
        cwd, # where to run
        env, # the environment
        timeout, # seconds, after which the command and all in its group are killed
       ): # a CompletedProcess with text
    "What `subprocess.run([sys.executable, *args])` does, in a process forked from the server."
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as null, socket.socket(socket.AF_UNIX) as s:
        def said():
            for f in (out, err): f.seek(0); yield f.read().decode()
        s.connect(path)
        order = json.dumps(dict(args=args, cwd=os.path.abspath(cwd or '.'), env=env)).encode()
        socket.send_fds(s, [len(order).to_bytes(8, 'big')], [f.fileno() for f in (null, out, err)])
        s.sendall(order)
        answers = s.makefile()
        pid = answers.readline()
        if not pid.strip().isdigit(): raise RuntimeError(f'the server of forked commands: {pid.strip() or "ended"}')
        s.settimeout(timeout)
        try: status = int(answers.readline())
        except TimeoutError:
            os.killpg(int(pid), signal.SIGKILL)
            raise subprocess.TimeoutExpired(args, timeout, *said()) from None
        except BaseException: os.killpg(int(pid), signal.SIGKILL); raise
        return subprocess.CompletedProcess(args, status, *said())

# ---- in the server

def imports():
    "Import what is slow to import, on one thread."
    import gc, importlib
    os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'               # to ask whether there is a GPU must not open it
    for m in SLOW: importlib.import_module(m)
    gc.collect(); gc.freeze()

def serve(s): # a listening socket
    "Take orders; in the process that is forked for one, return it."
    import select
    said, ready = '', False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, *_ = select.select([s, 0], [], [])
        if 0 in asked: os._exit(0)                                  # the tests have ended
        line, _ = s.accept()
        if not ready:
            ready = True
            imports()
            if len(os.listdir('/proc/self/task'))>1: said = 'an import has started a thread'
        if said: line.sendall(f'{said}\n'.encode())
        elif not os.fork(): return watch(s, line)
        line.close()

def watch(s, line):
    "Fork the command, say its number and then its status; in the command, return the order."
    s.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, fds, *_ = socket.recv_fds(line, 8, 3)
    order = json.loads(line.makefile('rb').read(int.from_bytes(head, 'big')))
    pid = os.fork()
    if pid:
        try: os.setpgid(pid, pid)
        except OSError: pass                                        # it has done so itself, and may have ended
        for fd in fds: os.close(fd)
        line.sendall(f'{pid}\n'.encode())
        line.sendall(f'{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n'.encode())
        os._exit(0)
    os.setpgid(0, 0)
    line.close()
    for i,fd in enumerate(fds): os.dup2(fd, i); os.close(fd)
    return order

def obey(args, cwd, env):
    "Be the interpreter that was asked for."
    import importlib, numpy, runpy, torch
    ours, wanted = json.loads(os.environ['FORKED_EARLY']), early(env)
    if other := sorted(k for k in ours.keys()|wanted if ours.get(k)!=wanted.get(k)): sys.exit(f'read when Python starts, so not for a forked command: {", ".join(other)}')
    os.environ.clear(); os.environ.update(env); os.chdir(cwd)
    torch.set_num_threads(int(env.get('OMP_NUM_THREADS', os.cpu_count())))
    numpy.random.seed(); torch.seed()                               # as random as in a new process
    importlib.invalidate_caches()
    how, *rest = args
    if how in ('-m', '-c'): what, *rest = rest
    sys.path[0] = cwd if how=='-m' else '' if how=='-c' else os.path.dirname(os.path.abspath(how))
    sys.argv = [how, *rest]
    if how=='-m':
        sys.modules.pop(what, None)                                 # it may have been imported, and runs anew
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    elif how=='-c':
        sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(what, '<string>', 'exec'), vars(sys.modules['__main__']))
    else: runpy.run_path(how, run_name='__main__')

def end(f, **kw):
    "Call `f` and end as an interpreter does, without the second in which it would free what was imported."
    import atexit, threading
    status, interrupted = 0, False
    try: f(**kw)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if e.code is not None and not isinstance(e.code, int): print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        status, interrupted = 1, isinstance(e, KeyboardInterrupt)
    threading._shutdown(); atexit._run_exitfuncs()
    for o in (sys.stdout, sys.stderr):
        try: o.flush()
        except (OSError, ValueError): pass
    if interrupted: signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 255)

if __name__=='__main__': end(obey, **serve(socket.socket(fileno=int(sys.argv[1]))))
