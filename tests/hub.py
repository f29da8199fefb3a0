"A Hugging Face hub on loopback: one repository, served from a folder"
import hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = 'c' * 40

class Hub:
    "Serves `folder` as the repository `repo`; `asked` holds what was asked for"
    def __init__(self, folder, repo): self.folder, self.repo, self.asked = Path(folder), repo, []

    def files(self): return sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob('*') if f.is_file())

    def __enter__(self):
        hub = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def answer(self, body, status=200, **headers):
                self.send_response(status)
                for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                if self.command == 'GET': self.wfile.write(body)
            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                hub.asked.append((self.command, path))
                files = {f: hub.folder/f for f in hub.files()}
                if path.startswith(f'/api/models/{hub.repo}'):
                    listing = [dict(type='file', path=f, size=p.stat().st_size, oid=COMMIT) for f, p in files.items()]
                    info = dict(id=hub.repo, sha=COMMIT, siblings=[dict(rfilename=f) for f in files])
                    return self.answer(json.dumps(listing if '/tree/' in path else info).encode(),
                                       Content_Type='application/json')
                head, _, name = path.partition('/resolve/')
                name = name.partition('/')[2]
                if head != f'/{hub.repo}' or name not in files:
                    return self.answer(b'', 404, X_Error_Code='EntryNotFound' if head == f'/{hub.repo}' else 'RepoNotFound')
                data = files[name].read_bytes()
                self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT,
                            Accept_Ranges='bytes', Content_Type='application/octet-stream')
            do_HEAD = do_GET
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()
