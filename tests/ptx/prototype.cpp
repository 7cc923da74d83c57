// STOP-GAP, to be replaced: the prototype interpreter behind executor.h.
// ptxrun.cpp - executes the PTX that nvcc emitted, on the CPU, warp by warp in lock step (SIMT stack), with
// memcheck / racecheck / initcheck / synccheck and bank-conflict / sector counters.  Prototype, C++17, no deps.
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>
#include <sys/mman.h>
#include "executor.h"
using std::string; using std::vector;
typedef uint64_t u64; typedef uint32_t u32; typedef int64_t s64; typedef int32_t s32; typedef uint16_t u16; typedef uint8_t u8;
[[noreturn]] static void die(const char* f, ...) { char b[600]; va_list a; va_start(a, f); vsnprintf(b, 600, f, a); va_end(a); throw std::runtime_error(b); }
// ------------------------------------------------------------------------------------------------ types
enum Cls : u8 { CU, CS, CB, CF, CBF, CP };
struct Ty { Cls c = CB; u8 bits = 32; u8 x2 = 0; int bytes() const { return bits / 8; } };
static bool parse_ty(const string& s, Ty& t) {
  static const std::map<string, Ty> m = {{"u8", {CU, 8}}, {"u16", {CU, 16}}, {"u32", {CU, 32}}, {"u64", {CU, 64}}, {"s8", {CS, 8}}, {"s16", {CS, 16}}, {"s32", {CS, 32}}, {"s64", {CS, 64}},
    {"b8", {CB, 8}}, {"b16", {CB, 16}}, {"b32", {CB, 32}}, {"b64", {CB, 64}}, {"f16", {CF, 16}}, {"f32", {CF, 32}}, {"f64", {CF, 64}}, {"bf16", {CBF, 16}}, {"f16x2", {CF, 32, 1}}, {"bf16x2", {CBF, 32, 1}}, {"pred", {CP, 8}}};
  auto i = m.find(s); if (i == m.end()) return false; t = i->second; return true;
}
static float b2f(u16 x) { u32 u = (u32)x << 16; float f; memcpy(&f, &u, 4); return f; }
static u16 f2b(float f) { u32 u; memcpy(&u, &f, 4); if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff; return (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
static float h2f(u16 h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
static u16 f2h(float f) { _Float16 x = (_Float16)f; u16 h; memcpy(&h, &x, 2); return h; }
static float odd(double d) { float f = (float)d; if ((double)f == d || std::isnan(d) || std::isinf(f)) return f; float g = std::fabs((double)f) > std::fabs(d) ? std::nextafterf(f, 0.f) : f; u32 u; memcpy(&u, &g, 4); u |= 1; memcpy(&g, &u, 4); return g; }
static float asf(u64 v) { u32 u = (u32)v; float f; memcpy(&f, &u, 4); return f; }
static double asd(u64 v) { double f; memcpy(&f, &v, 8); return f; }
static u64 bf(float f) { u32 u; memcpy(&u, &f, 4); return u; }
static u64 bd(double f) { u64 u; memcpy(&u, &f, 8); return u; }
static double getf(u64 v, Ty t) { if (t.c == CBF) return b2f((u16)v); if (t.bits == 16) return h2f((u16)v); return t.bits == 32 ? asf(v) : asd(v); }
static u64 putf(double d, Ty t) { if (t.c == CBF) return f2b(odd(d)); if (t.bits == 16) return f2h(odd(d)); return t.bits == 32 ? bf((float)d) : bd(d); }
static s64 sx(u64 v, int bits) { return bits == 64 ? (s64)v : (s64)(v << (64 - bits)) >> (64 - bits); }
static u64 zx(u64 v, int bits) { return bits == 64 ? v : v & ((1ull << bits) - 1); }
// ------------------------------------------------------------------------------------------------ program
enum OK : u8 { O_NONE, O_REG, O_IMM, O_SREG, O_MEM, O_VEC, O_SYM, O_SINK };
struct Opnd { OK k = O_NONE; int r = -1; u64 imm = 0; s64 off = 0; bool neg = false; int space = 0; vector<Opnd> v; int r2 = -1; OK basek = O_NONE; };
enum SP { SP_GEN, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST };
struct Ins { int pred = -1; bool pneg = false; string op; vector<string> o; vector<Opnd> a; int line = 0, ptxline = 0; int id = 0; Ty t, t2; int target = -1; int rpc = -1; int sp = 0, vec = 1; bool ftz = false; string text;
  // counters
  u64 execs = 0, lanes = 0, waves = 0, ideal = 0, bytes = 0; };
struct Sym { int space; u64 addr; u64 size; };
struct Kernel { string name; vector<Ins> ins; vector<std::pair<string, int>> params; vector<int> poff; std::map<string, Sym> syms; int nreg = 0; vector<u8> rbits; u32 static_smem = 0, local = 0; int maxntid = 0; };
enum { I_mov, I_ld, I_st, I_cvta, I_add, I_sub, I_mul, I_mad, I_fma, I_div, I_rem, I_min, I_max, I_neg, I_abs, I_shl, I_shr, I_and, I_or, I_xor, I_not, I_lop3, I_bfi, I_bfe, I_prmt, I_shf, I_popc, I_bfind, I_clz, I_brev,
  I_setp, I_selp, I_cvt, I_bra, I_ret, I_bar, I_barwarp, I_shfl, I_vote, I_activemask, I_cpasync, I_ldmatrix, I_mma, I_atom, I_red, I_math, I_nop, I_trap };
static const std::map<string, int> OPS = {{"mov", I_mov}, {"ld", I_ld}, {"ldu", I_ld}, {"st", I_st}, {"cvta", I_cvta}, {"add", I_add}, {"sub", I_sub}, {"mul", I_mul}, {"mad", I_mad}, {"fma", I_fma}, {"div", I_div}, {"rem", I_rem}, {"min", I_min}, {"max", I_max}, {"neg", I_neg}, {"abs", I_abs},
  {"shl", I_shl}, {"shr", I_shr}, {"and", I_and}, {"or", I_or}, {"xor", I_xor}, {"not", I_not}, {"lop3", I_lop3}, {"bfi", I_bfi}, {"bfe", I_bfe}, {"prmt", I_prmt}, {"shf", I_shf}, {"popc", I_popc}, {"bfind", I_bfind}, {"clz", I_clz}, {"brev", I_brev}, {"setp", I_setp}, {"selp", I_selp}, {"cvt", I_cvt},
  {"bra", I_bra}, {"ret", I_ret}, {"exit", I_ret}, {"bar", I_bar}, {"barrier", I_bar}, {"shfl", I_shfl}, {"vote", I_vote}, {"activemask", I_activemask}, {"cp", I_cpasync}, {"ldmatrix", I_ldmatrix}, {"mma", I_mma}, {"atom", I_atom}, {"red", I_red},
  {"ex2", I_math}, {"lg2", I_math}, {"rcp", I_math}, {"sqrt", I_math}, {"rsqrt", I_math}, {"sin", I_math}, {"cos", I_math}, {"tanh", I_math}, {"membar", I_nop}, {"fence", I_nop}, {"prefetch", I_nop}, {"griddepcontrol", I_nop}, {"trap", I_trap}};
static const vector<string> SREGS = {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%lanemask_lt", "%lanemask_le", "%lanemask_eq", "%lanemask_ge", "%lanemask_gt", "%dynamic_smem_size", "%clock", "%clock64", "%smid"};
static const u64 SH_WIN = 0x7e0000000000ull, LO_WIN = 0x7d0000000000ull; static const u32 SH_BASE = 1024;
static vector<string> split(const string& s, char sep) { vector<string> r; int d = 0; string c; for (char x : s) { if (strchr("[{(", x)) d++; if (strchr("]})", x)) d--; if (x == sep && !d) { r.push_back(c); c.clear(); } else c += x; } r.push_back(c); return r; }
static string trim(const string& s) { size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n"); return a == s.npos ? "" : s.substr(a, b - a + 1); }
struct Parser {
  string src; Kernel* k; vector<std::map<string, int>> scope; std::map<string, Sym> modsyms; u32 mod_smem = 0;
  int lookup(const string& n) { for (int i = (int)scope.size() - 1; i >= 0; i--) { auto f = scope[i].find(n); if (f != scope[i].end()) return f->second; } return -1; }
  bool imm(const string& t, u64& v, Ty ty) {
    if (t.size() > 2 && t[0] == '0' && (t[1] == 'f' || t[1] == 'F')) { v = strtoull(t.c_str() + 2, 0, 16); return true; }
    if (t.size() > 2 && t[0] == '0' && (t[1] == 'd' || t[1] == 'D')) { v = strtoull(t.c_str() + 2, 0, 16); return true; }
    if (isdigit(t[0]) || ((t[0] == '-' || t[0] == '+') && t.size() > 1 && isdigit(t[1]))) {
      if (t.find('.') != t.npos) { double d = atof(t.c_str()); v = ty.bits == 64 ? bd(d) : bf((float)d); return true; }
      v = t[0] == '-' ? (u64)-(s64)strtoull(t.c_str() + 1, 0, 0) : strtoull(t.c_str(), 0, 0); return true; }
    return false;
  }
  Opnd opnd(string t, Ty ty) {
    t = trim(t); Opnd o;
    if (t == "_") { o.k = O_SINK; return o; }
    if (t[0] == '{') { o.k = O_VEC; for (auto& x : split(t.substr(1, t.rfind('}') - 1), ',')) o.v.push_back(opnd(x, ty)); return o; }
    if (t[0] == '[') { string in = trim(t.substr(1, t.rfind(']') - 1)); size_t p = in.find('+'); string base = trim(p == in.npos ? in : in.substr(0, p)); if (p != in.npos) o.off = (s64)strtoll(trim(in.substr(p + 1)).c_str(), 0, 0);
      Opnd b = opnd(base, {CU, 64}); o.k = O_MEM; o.basek = b.k; o.r = b.r; o.imm = b.imm; o.space = b.space; return o; }
    if (t[0] == '!') { o = opnd(t.substr(1), ty); o.neg = true; return o; }
    size_t bar = t.find('|'); if (bar != t.npos) { o = opnd(t.substr(0, bar), ty); o.r2 = lookup(trim(t.substr(bar + 1))); return o; }
    int r = lookup(t); if (r >= 0) { o.k = O_REG; o.r = r; return o; }
    if (t[0] == '%') { for (size_t i = 0; i < SREGS.size(); i++) if (SREGS[i] == t) { o.k = O_SREG; o.r = (int)i; return o; } die("unknown register %s", t.c_str()); }
    if (imm(t, o.imm, ty)) { o.k = O_IMM; return o; }
    size_t p = t.find('+'); string nm = trim(t.substr(0, p)); s64 off = p == t.npos ? 0 : strtoll(t.c_str() + p + 1, 0, 0);
    auto f = k->syms.find(nm); if (f == k->syms.end()) { f = modsyms.find(nm); if (f == modsyms.end()) die("unknown symbol '%s'", t.c_str()); }
    o.k = O_SYM; o.imm = f->second.addr + off; o.space = f->second.space; return o;
  }
  void decl_var(const string& st, bool module) {   // .shared .align 16 .b8 name[N];
    int space = st.find(".shared") != st.npos ? SP_SHARED : st.find(".local") != st.npos ? SP_LOCAL : st.find(".const") != st.npos ? SP_CONST : SP_GLOBAL;
    u32 al = 4; size_t p = st.find(".align"); if (p != st.npos) al = atoi(st.c_str() + p + 6);
    string head = st.substr(0, st.find('=')); size_t e = head.find('['); string nm = trim(head.substr(0, e)); nm = nm.substr(nm.find_last_of(" \t") + 1);
    Ty t{CB, 8}; for (auto& w : split(head, ' ')) { string q = trim(w); if (!q.empty() && q[0] == '.') { Ty x; if (parse_ty(q.substr(1), x)) t = x; } }
    u64 n = e == head.npos ? 1 : strtoull(head.c_str() + e + 1, 0, 0); u64 bytes = n * t.bytes();
    auto& tab = module ? modsyms : k->syms;
    if (space == SP_SHARED) { u32& top = module ? mod_smem : k->static_smem; if (st.find(".extern") != st.npos) { tab[nm] = {SP_SHARED, ~0ull, 0}; return; } top = (top + al - 1) / al * al; tab[nm] = {SP_SHARED, SH_BASE + top, bytes}; top += bytes; }
    else if (space == SP_LOCAL) { k->local = (k->local + al - 1) / al * al; tab[nm] = {SP_LOCAL, k->local, bytes}; k->local += bytes; }
    else { u8* m = (u8*)aligned_alloc(256, (bytes + 255) / 256 * 256); memset(m, 0, bytes); tab[nm] = {space, (u64)m, bytes};
      size_t b = st.find('{'); size_t eq = st.find('='); if (eq != st.npos) { string body = b != st.npos ? st.substr(b + 1, st.rfind('}') - b - 1) : st.substr(eq + 1); u64 i = 0; for (auto& x : split(body, ',')) { u64 v; string q = trim(x); if (q.empty()) continue; if (!imm(q, v, t)) die("initialiser %s", q.c_str()); memcpy(m + i * t.bytes(), &v, t.bytes()); i++; } } }
  }
  static string strip(const string& s) { string r; for (size_t i = 0; i < s.size();) { if (s[i] == '/' && s[i + 1] == '/') { while (i < s.size() && s[i] != '\n') i++; } else if (s[i] == '/' && s[i + 1] == '*') { while (!(s[i] == '*' && s[i + 1] == '/')) { if (s[i] == '\n') r += '\n'; i++; } i += 2; } else r += s[i++]; } return r; }
  std::unique_ptr<Kernel> parse(const string& text, const string& want) {
    src = strip(text); std::unique_ptr<Kernel> kp; size_t pos = 0, found = string::npos;
    while ((pos = src.find(".entry", pos)) != string::npos) { size_t a = pos + 6; while (isspace(src[a])) a++; size_t b = a; while (isalnum(src[b]) || src[b] == '_' || src[b] == '$') b++; string nm = src.substr(a, b - a); if (nm == want) { found = pos; kp.reset(new Kernel); kp->name = nm; pos = b; break; } pos = b; }
    if (found == string::npos) die("no .entry matching '%s'", want.c_str());
    k = kp.get();
    // module scope variables: statements starting with .extern/.global/.shared/.const at depth 0
    { int d = 0; size_t i = 0; string st; for (; i < src.size(); i++) { char c = src[i]; if (c == '{') d++; if (c == '}') d--; if (d == 0 || (d >= 0 && st.find('=') != st.npos)) { if (c == '\n' && (trim(st).rfind(".version", 0) == 0 || trim(st).rfind(".target", 0) == 0 || trim(st).rfind(".address_size", 0) == 0 || trim(st).rfind(".file", 0) == 0)) { st.clear(); continue; }
        if (c == ';') { string t = trim(st); if ((t.find(".shared") != t.npos || t.find(".global") != t.npos || t.find(".const") != t.npos) && t.find(".entry") == t.npos && t.find(".func") == t.npos) decl_var(t, true); st.clear(); } else if (c == '}' && st.find('=') == st.npos) st.clear(); else st += c; } } }
    size_t po = src.find('(', pos), pc = src.find(')', po), bo = src.find('{', pos);
    if (po != src.npos && po < bo) { for (auto& p : split(src.substr(po + 1, pc - po - 1), ',')) { string q = trim(p); if (q.empty()) continue; string t2 = q; size_t br = q.find('['); u64 cnt = 1; string head = q.substr(0, br); if (br != q.npos) cnt = strtoull(q.c_str() + br + 1, 0, 0); string nm = trim(head); nm = nm.substr(nm.find_last_of(" \t") + 1); Ty t{CU, 64}; for (auto& w : split(head, ' ')) { string z = trim(w); if (!z.empty() && z[0] == '.') { Ty x; if (parse_ty(z.substr(1), x)) t = x; } } int sz = t.bytes() * cnt; int al = br != q.npos ? 8 : t.bytes(); size_t ap = q.find(".align"); if (ap != q.npos) al = atoi(q.c_str() + ap + 6); int off = k->params.empty() ? 0 : k->poff.back() + k->params.back().second; off = (off + al - 1) / al * al; k->params.push_back({nm, sz}); k->poff.push_back(off); k->syms[nm] = {SP_PARAM, (u64)off, (u64)sz}; } }
    string dir = src.substr(pc + 1, bo - pc - 1); size_t mx = dir.find(".maxntid"); if (mx != dir.npos) { int a = 1, b = 1, c = 1; sscanf(dir.c_str() + mx + 8, " %d, %d, %d", &a, &b, &c); k->maxntid = a * b * c; }
    int ptxline = 1 + std::count(src.begin(), src.begin() + bo, '\n'); size_t i = bo; int depth = 0, curline = 0; std::map<string, int> labels; vector<std::pair<int, string>> fix; string cur;
    for (;;) {
      while (i < src.size() && isspace(src[i])) { if (src[i] == '\n') ptxline++; i++; }
      char c = src[i];
      if (c == '{') { depth++; scope.emplace_back(); i++; continue; }
      if (c == '}') { depth--; scope.pop_back(); i++; if (!depth) break; continue; }
      if (c == ';') { i++; continue; }
      if (src.compare(i, 4, ".loc") == 0 || src.compare(i, 7, ".pragma") == 0) { size_t e = src.find('\n', i); string l = src.substr(i, e - i); if (l[1] == 'l') { int f, ln, f2 = 0, l2 = 0; sscanf(l.c_str(), ".loc %d %d", &f, &ln); size_t q = l.find("inlined_at"); if (q != l.npos) sscanf(l.c_str() + q, "inlined_at %d %d", &f2, &l2); if (f == 1) curline = ln; else if (f2 == 1) curline = l2; } i = e; continue; }
      size_t e = i; int bd = 0; bool lab = false; for (; e < src.size(); e++) { char x = src[e]; if (strchr("{[(", x)) bd++; if (strchr("}])", x)) bd--; if (x == ';' && !bd) break; if (x == ':' && !bd && src[e + 1] != ':' && src[e - 1] != ':') { bool id = true; for (size_t q = i; q < e; q++) if (!(isalnum(src[q]) || src[q] == '_' || src[q] == '$')) id = false; if (id) { lab = true; break; } } }
      string st = trim(src.substr(i, e - i)); int myline = ptxline; ptxline += std::count(src.begin() + i, src.begin() + e, '\n'); i = e + 1;
      if (lab) { labels[st] = (int)k->ins.size(); continue; }
      if (st.compare(0, 4, ".reg") == 0) {
        string r = trim(st.substr(4)); size_t sp = r.find_first_of(" \t"); Ty t; if (!parse_ty(r.substr(1, sp - 1), t)) die("reg type %s", st.c_str());
        for (auto& n0 : split(r.substr(sp), ',')) { string n = trim(n0); size_t lt = n.find('<'); if (lt != n.npos) { int cnt = atoi(n.c_str() + lt + 1); string b = n.substr(0, lt); for (int q = 0; q < cnt; q++) { scope.back()[b + std::to_string(q)] = k->nreg++; k->rbits.push_back(t.c == CP ? 1 : t.bits); } } else { scope.back()[n] = k->nreg++; k->rbits.push_back(t.c == CP ? 1 : t.bits); } }
        continue; }
      if (st[0] == '.') { if (st.find(".shared") != st.npos || st.find(".local") != st.npos || st.find(".global") != st.npos) decl_var(st, false); continue; }
      Ins in; in.line = curline; in.ptxline = myline; in.text = st;
      if (st[0] == '@') { size_t q = st.find_first_of(" \t"); string p = st.substr(1, q - 1); if (p[0] == '!') { in.pneg = true; p = p.substr(1); } in.pred = lookup(p); if (in.pred < 0) die("pred %s", p.c_str()); st = trim(st.substr(q)); }
      size_t q = st.find_first_of(" \t{["); string opc = q == st.npos ? st : st.substr(0, q); string rest = q == st.npos ? "" : trim(st.substr(q));
      for (auto& x : split(opc, '.')) in.o.push_back(x);
      in.op = in.o[0]; auto f = OPS.find(in.op); if (f == OPS.end()) die("unsupported instruction at ptx line %d: %s", myline, st.c_str());
      in.id = f->second; int nt = 0; for (auto& x : in.o) { Ty t; if (parse_ty(x, t)) { if (nt == 0) in.t = t; else in.t2 = t; nt++; } if (x == "ftz") in.ftz = true; if (x == "v2") in.vec = 2; if (x == "v4") in.vec = 4;
        if (x == "global") in.sp = SP_GLOBAL; else if (x.rfind("shared", 0) == 0) in.sp = SP_SHARED; else if (x == "local") in.sp = SP_LOCAL; else if (x == "param") in.sp = SP_PARAM; else if (x == "const") in.sp = SP_CONST; }
      if (in.id == I_bra) { fix.push_back({(int)k->ins.size(), trim(rest)}); k->ins.push_back(in); continue; }
      if (in.id == I_bar && in.o.size() > 1 && in.o[1] == "warp") in.id = I_barwarp;
      if (!rest.empty()) for (auto& x : split(rest, ',')) in.a.push_back(opnd(x, in.t));
      k->ins.push_back(in);
    }
    Ins endi; endi.id = I_ret; endi.op = "ret"; k->ins.push_back(endi);
    for (auto& fx : fix) { auto l = labels.find(fx.second); if (l == labels.end()) die("label %s", fx.second.c_str()); k->ins[fx.first].target = l->second; }
    if (k->static_smem || mod_smem) { for (auto& s : k->syms) if (s.second.space == SP_SHARED && s.second.addr != ~0ull) s.second.addr += 0; k->static_smem += mod_smem; }
    postdom(); return kp;
  }
  void postdom() {   // immediate post-dominator of every branch -> reconvergence pc
    auto& I = k->ins; int n = I.size(); vector<int> lead(n, 0); lead[0] = 1; for (int i = 0; i < n; i++) { if (I[i].id == I_bra) { lead[I[i].target] = 1; if (i + 1 < n) lead[i + 1] = 1; } if (I[i].id == I_ret && i + 1 < n) lead[i + 1] = 1; }
    vector<int> bid(n), start; for (int i = 0; i < n; i++) { if (lead[i]) start.push_back(i); bid[i] = (int)start.size() - 1; } int B = start.size(), EX = B;
    vector<vector<int>> suc(B + 1), pre(B + 1); for (int b = 0; b < B; b++) { int e = (b + 1 < B ? start[b + 1] : n) - 1; auto& x = I[e]; auto add = [&](int s) { suc[b].push_back(s); pre[s].push_back(b); }; if (x.id == I_bra) { add(bid[x.target]); if (x.pred >= 0 && e + 1 < n) add(bid[e + 1]); } else if (x.id == I_ret) { add(EX); if (x.pred >= 0 && e + 1 < n) add(bid[e + 1]); } else add(e + 1 < n ? bid[e + 1] : EX); }
    vector<int> order, num(B + 1, -1); vector<u8> seen(B + 1, 0); vector<std::pair<int, size_t>> st{{EX, 0}}; seen[EX] = 1; while (!st.empty()) { auto& [v, ix] = st.back(); if (ix < pre[v].size()) { int w = pre[v][ix++]; if (!seen[w]) { seen[w] = 1; st.push_back({w, 0}); } } else { num[v] = order.size(); order.push_back(v); st.pop_back(); } }
    vector<int> ip(B + 1, -1); ip[EX] = EX; bool ch = true; while (ch) { ch = false; for (int q = (int)order.size() - 2; q >= 0; q--) { int v = order[q], nw = -1; for (int s : suc[v]) if (ip[s] >= 0) { if (nw < 0) nw = s; else { int a = nw, b = s; while (a != b) { while (num[a] < num[b]) a = ip[a]; while (num[b] < num[a]) b = ip[b]; } nw = a; } } if (nw >= 0 && ip[v] != nw) { ip[v] = nw; ch = true; } } }
    for (int i = 0; i < n; i++) if (I[i].id == I_bra) { int p = ip[bid[i]]; I[i].rpc = (p < 0 || p == EX) ? 1 << 30 : start[p]; }
  }
};
// ------------------------------------------------------------------------------------------------ memory + checkers
struct GB { u32 wep, rep, wblk, rblk; u16 wt, rt; };
struct Buf { u64 a, n; bool readonly; vector<u8> init; vector<GB> sh; };
static std::map<u64, Buf> bufs; static Buf* last_buf;
static Buf* find_buf(u64 a) { if (last_buf && a - last_buf->a < last_buf->n) return last_buf; auto i = bufs.upper_bound(a); if (i == bufs.begin()) return nullptr; --i; Buf& b = i->second; if (a - b.a > b.n + 256) return nullptr; last_buf = &b; return &b; }
struct Acc { u32 be, we; u16 t; }; struct SB { Acc w, r1, r2; u8 init, pend; u16 pown; };
struct Pend { u32 dst; u64 src; int bytes, sb, group; };
struct Warp { vector<u64> reg; vector<u32> def; struct Fr { int pc, rpc; u32 mask; }; vector<Fr> st; u32 exited = 0, live = 0; bool atbar = false; int barline = 0; u32 we = 0; vector<Pend> pend[32]; int group[32]; vector<u8> local; };
static std::map<string, std::pair<u64, string>> all_errs;
struct Machine {
  Kernel* k; vector<u8> pbuf; u32 grid[3], block[3], cta[3]; u32 smem_size = 0; vector<u8> sm; vector<SB> ssh; vector<Warp> w; u32 epoch = 1, launch_ep = 1, blk = 0; int nthr = 0, nw = 0; u32 dyn_off = 0;
  u64 errors = 0, winstr = 0, bars = 0; std::map<string, std::pair<u64, string>>& errs = all_errs; int cw = 0; Ins* ci = nullptr; bool race = true; int order = 0;
  void err(const char* kind, int lane, const char* f, ...) {
    errors++; string key = string(kind) + ":" + std::to_string(ci ? ci->ptxline : 0); auto& e = errs[key]; if (e.first++) return; char b[300]; va_list a; va_start(a, f); vsnprintf(b, 300, f, a); va_end(a); char c[700];
    snprintf(c, 700, "%s: %s | block (%u,%u,%u) thread %d, line %d, ptx %d: %.90s", kind, b, cta[0], cta[1], cta[2], cw * 32 + lane, ci ? ci->line : 0, ci ? ci->ptxline : 0, ci ? ci->text.c_str() : ""); e.second = c;
  }
  bool ord(const Acc& a, int t) { return a.be != epoch || a.t == t || (a.t / 32 == cw && a.we != w[cw].we); }
  bool s_acc(u64 addr, int n, bool wr, int l) {
    u64 o = addr - SH_BASE; int t = cw * 32 + l;
    if (addr < SH_BASE || o + n > smem_size) { err("shared out of bounds", l, "%s of %d bytes at smem+%lld, size %u", wr ? "write" : "read", n, (long long)o, smem_size); return false; }
    if (o % n) { err("misaligned shared access", l, "%d bytes at smem+%llu", n, (unsigned long long)o); }
    if (!race) return true; Acc me{epoch, w[cw].we, (u16)t};
    for (int i = 0; i < n; i++) { SB& b = ssh[o + i];
      if (b.pend) { err("cp.async in flight", l, "%s of smem+%llu, copy issued by thread %d not waited for", wr ? "write" : "read", (unsigned long long)(o + i), b.pown); continue; }
      if (wr) { const Acc* c = b.w.be && !ord(b.w, t) ? &b.w : b.r1.be && !ord(b.r1, t) ? &b.r1 : b.r2.be && !ord(b.r2, t) ? &b.r2 : nullptr;
        if (c) err(c == &b.w ? "race W-W (shared)" : "race R-W (shared)", l, "smem+%llu, other thread %d", (unsigned long long)(o + i), c->t); b.w = me; b.init = 1; }
      else { if (!b.init) err("uninitialised shared read", l, "smem+%llu", (unsigned long long)(o + i)); if (b.w.be && !ord(b.w, t)) err("race W-R (shared)", l, "smem+%llu written by thread %d", (unsigned long long)(o + i), b.w.t);
        if (b.r1.be != epoch || b.r1.t == t) b.r1 = me; else if (b.r2.be != epoch || b.r1.t / 32 == b.r2.t / 32) b.r2 = me; } }
    return true;
  }
  bool g_acc(u64 a, int n, bool wr, int l, bool at = false) {
    int t = cw * 32 + l; Buf* bp = find_buf(a);
    if (!bp) { for (auto& s : k->syms) if (s.second.space == SP_GLOBAL || s.second.space == SP_CONST) if (a >= s.second.addr && a + n <= s.second.addr + s.second.size) return true; for (auto& s : *mods) if ((s.second.space == SP_GLOBAL || s.second.space == SP_CONST) && a >= s.second.addr && a + n <= s.second.addr + s.second.size) return true; err("global wild pointer", l, "%s of %d bytes at %llx", wr ? "write" : "read", n, (unsigned long long)a); return false; }
    Buf& B = *bp; u64 o = a - B.a; if (o + n > B.n) { err("global out of bounds", l, "%s of %d bytes at offset %llu of a buffer of %llu bytes", wr ? "write" : "read", n, (unsigned long long)o, (unsigned long long)B.n); return false; }
    if (a % n) err("misaligned global access", l, "%d bytes at offset %llu", n, (unsigned long long)o);
    if (wr && B.readonly) err("write to read-only buffer", l, "offset %llu", (unsigned long long)o);
    if (!wr && !at) for (int i = 0; i < n; i++) if (!B.init[o + i]) { err("uninitialised global read", l, "offset %llu", (unsigned long long)(o + i)); break; }
    if (wr) memset(&B.init[o], 1, n); if (!race) return true;
    for (u64 g = o / 2; g <= (o + n - 1) / 2; g++) { GB& b = B.sh[g]; u16 me = at ? 0xffff : t; bool wc = b.wep >= launch_ep && (b.wblk != blk || (b.wep == epoch && b.wt != me)) && !(at && b.wt == 0xffff); bool rc = b.rep >= launch_ep && (b.rblk != blk || (b.rep == epoch && b.rt != me)) && !(at && b.rt == 0xffff);
      if (wc) err(wr ? "race W-W (global)" : "race W-R (global)", l, "offset %llu, other block %u thread %d", (unsigned long long)(2 * g), b.wblk, b.wt); else if (wr && rc) err("race R-W (global)", l, "offset %llu, other block %u thread %d", (unsigned long long)(2 * g), b.rblk, b.rt);
      if (wr) { b.wep = epoch; b.wblk = blk; b.wt = me; } else { b.rep = epoch; b.rblk = blk; b.rt = me; } }
    return true;
  }
  std::map<string, Sym>* mods;
  u64 sreg(int i, int l) { u32 t = cw * 32 + l; switch (i) { case 0: return t % block[0]; case 1: return t / block[0] % block[1]; case 2: return t / (block[0] * block[1]); case 3: case 4: case 5: return block[i - 3]; case 6: case 7: case 8: return cta[i - 6]; case 9: case 10: case 11: return grid[i - 9]; case 12: return l; case 13: return cw; case 14: return (1u << l) - 1; case 15: return (2u << l) - 1; case 16: return 1u << l; case 17: return ~((1u << l) - 1); case 18: return ~((2u << l) - 1); case 19: return smem_size; } return 0; }
  inline u64 rd(const Opnd& o, int l) { switch (o.k) { case O_REG: return w[cw].reg[o.r * 32 + l]; case O_IMM: return o.imm; case O_SREG: return sreg(o.r, l); case O_SYM: return o.imm == ~0ull ? SH_BASE + dyn_off : o.imm; default: die("operand in %s", ci->text.c_str()); } }
  inline void wr(const Opnd& o, int l, u64 v, Ty t) { if (o.k == O_SINK) return; if (o.k != O_REG) die("dest in %s", ci->text.c_str()); int rb = k->rbits[o.r]; if (rb == 1) v = v != 0; else { if (t.c == CS && t.bits < rb) v = (u64)sx(v, t.bits); else v = zx(v, t.bits); v = zx(v, rb); } w[cw].reg[o.r * 32 + l] = v; w[cw].def[o.r] |= 1u << l; }
  u64 addr(const Opnd& o, int l) { u64 b = o.basek == O_REG ? w[cw].reg[o.r * 32 + l] : (o.imm == ~0ull ? SH_BASE + dyn_off : o.imm); return b + o.off; }
  int space(int sp, u64& a) { if (sp != SP_GEN) return sp; if (a >= SH_WIN && a < SH_WIN + (1u << 24)) { a -= SH_WIN; return SP_SHARED; } if (a >= LO_WIN && a < LO_WIN + (1u << 24)) { a -= LO_WIN; return SP_LOCAL; } return SP_GLOBAL; }
  void usecheck(const Opnd& o, u32 act) { if (o.k == O_REG || (o.k == O_MEM && o.basek == O_REG)) { u32 bad = act & ~w[cw].def[o.r]; if (bad) err("uninitialised register", __builtin_ctz(bad), "operand of %s", ci->op.c_str()); } else if (o.k == O_VEC) for (auto& x : o.v) usecheck(x, act); }
  // wavefronts for a shared access: groups of lanes limited to 128 bytes per pass
  void banks(u64* ad, u32 act, int n) { int per = n <= 4 ? 32 : n == 8 ? 16 : 8; u64 wv = 0, id = 0; for (int g = 0; g < 32; g += per) { int cnt[32] = {0}, mx = 0; u64 seen[32][8]; bool any = false; for (int l = g; l < g + per; l++) if (act >> l & 1) { any = true; for (u64 q = ad[l] / 4; q <= (ad[l] + n - 1) / 4; q++) { int b = q & 31; bool dup = false; for (int z = 0; z < cnt[b] && z < 8; z++) if (seen[b][z] == q) dup = true; if (!dup) { if (cnt[b] < 8) seen[b][cnt[b]] = q; mx = std::max(mx, ++cnt[b]); } } } if (any) { wv += mx; id++; } } ci->waves += wv; ci->ideal += id; }
  void sectors(u64* ad, u32 act, int n) { u64 v[64]; int c = 0; u64 by = 0; std::set<u64> bytes; for (int l = 0; l < 32; l++) if (act >> l & 1) { v[c++] = ad[l] / 32; if ((ad[l] + n - 1) / 32 != ad[l] / 32) v[c++] = (ad[l] + n - 1) / 32; bytes.insert(ad[l]); } by = bytes.size() * n; std::sort(v, v + c); int u = std::unique(v, v + c) - v; ci->waves += u; ci->ideal += (by + 31) / 32; ci->bytes += by; }
  void memop(Ins& in, u32 act, bool store) {
    Opnd& m = in.a[store ? 0 : 1]; Opnd& d = in.a[store ? 1 : 0]; int eb = in.t.bytes(), n = eb * in.vec; u64 ad[32]; int sp = 0; u32 ok = 0;
    for (int l = 0; l < 32; l++) if (act >> l & 1) { u64 a = addr(m, l); int s = space(in.sp, a); ad[l] = a; sp = s; u8* p = nullptr; bool o = true;
      if (s == SP_SHARED) { o = s_acc(a, n, store, l); if (o) p = &sm[a - SH_BASE]; }
      else if (s == SP_PARAM) { if (a + n > pbuf.size()) die("param"); p = &pbuf[a]; }
      else if (s == SP_LOCAL) { if (a + n > k->local) { err("local out of bounds", l, "%llu", (unsigned long long)a); o = false; } else p = &w[cw].local[l * k->local + a]; }
      else if (s == SP_CONST) p = (u8*)a; else { o = g_acc(a, n, store, l); p = (u8*)a; }
      if (!o) { if (!store) for (int i = 0; i < in.vec; i++) wr(d.k == O_VEC ? d.v[i] : d, l, 0x7fffffff7fffffffull, in.t); continue; }
      ok |= 1u << l;
      for (int i = 0; i < in.vec; i++) { Opnd& e = d.k == O_VEC ? d.v[i] : d; if (store) { u64 v = rd(e, l); memcpy(p + i * eb, &v, eb); } else { u64 v = 0; memcpy(&v, p + i * eb, eb); wr(e, l, v, in.t); } } }
    if (ok) { if (sp == SP_SHARED) banks(ad, ok, n); else if (sp == SP_GLOBAL) sectors(ad, ok, n); }
  }
  static double flush(double d, Ty t, bool ftz) { if (ftz && t.bits == 32 && std::fabs(d) < 1.17549435e-38) return std::copysign(0.0, d); return d; }
  u64 arith(Ins& in, Ty t, u64 a, u64 b, u64 c) {
    bool wide = in.o[1] == "wide", hi = in.o[1] == "hi";
    if (t.c == CF || t.c == CBF) {
      double x = flush(getf(a, t), t, in.ftz), y = flush(getf(b, t), t, in.ftz), z = 0, r;
      if (t.bits == 32) { float fx = x, fy = y, fz, q; switch (in.id) { case I_add: q = fx + fy; break; case I_sub: q = fx - fy; break; case I_mul: q = fx * fy; break; case I_fma: case I_mad: fz = flush(asf(c), t, in.ftz); q = fmaf(fx, fy, fz); break; case I_div: q = fx / fy; break; case I_min: q = fminf(fx, fy); break; case I_max: q = fmaxf(fx, fy); break; case I_neg: q = -fx; break; case I_abs: q = fabsf(fx); break; default: die("f32 %s", in.text.c_str()); } return bf((float)flush(q, t, in.ftz)); }
      switch (in.id) { case I_add: r = x + y; break; case I_sub: r = x - y; break; case I_mul: r = x * y; break; case I_fma: case I_mad: z = getf(c, t); r = t.bits == 64 ? fma(x, y, z) : x * y + z; break; case I_div: r = x / y; break; case I_min: r = fmin(x, y); break; case I_max: r = fmax(x, y); break; case I_neg: r = -x; break; case I_abs: r = fabs(x); break; default: die("fp %s", in.text.c_str()); }
      return putf(r, t); }
    int n = t.bits; bool s = t.c == CS; u64 ua = zx(a, n), ub = zx(b, n); s64 sa = sx(a, n), sb = sx(b, n);
    switch (in.id) { case I_add: return ua + ub; case I_sub: return ua - ub; case I_mul: case I_mad: { unsigned __int128 p = s ? (unsigned __int128)((__int128)sa * sb) : (unsigned __int128)ua * ub; u64 r = hi ? (u64)(p >> n) : (u64)p; return in.id == I_mad ? r + c : r; }
      case I_div: if (!ub) return ~0ull; return s ? (u64)(sa / sb) : ua / ub; case I_rem: if (!ub) return ua; return s ? (u64)(sa % sb) : ua % ub; case I_min: return s ? (u64)std::min(sa, sb) : std::min(ua, ub); case I_max: return s ? (u64)std::max(sa, sb) : std::max(ua, ub); case I_neg: return (u64)-sa; case I_abs: return (u64)std::llabs(sa); }
    (void)wide; die("int %s", in.text.c_str());
  }
  u64 convert(Ins& in, u64 v) {
    Ty d = in.t, s = in.t2; bool df = d.c == CF || d.c == CBF, sf = s.c == CF || s.c == CBF; auto has = [&](const char* x) { return std::find(in.o.begin(), in.o.end(), x) != in.o.end(); };
    if (sf) { double x = flush(getf(v, s), s, in.ftz); if (has("rni")) x = nearbyint(x); else if (has("rzi")) x = trunc(x); else if (has("rmi")) x = floor(x); else if (has("rpi")) x = ceil(x); if (df) { if (has("sat")) x = x < 0 || std::isnan(x) ? 0 : x > 1 ? 1 : x; if (has("relu") && x < 0) x = 0; if (d.c == CBF && (has("rz"))) { u64 u = bf((float)x); return u >> 16; } return putf(x, d); }
      if (std::isnan(x)) return 0; if (d.c == CS) { double lo = -ldexp(1, d.bits - 1), hi2 = ldexp(1, d.bits - 1) - 1; x = std::max(lo, std::min(hi2, x)); return (u64)(s64)x; } double hi2 = ldexp(1, d.bits) - 1; x = std::max(0.0, std::min(hi2, x)); return (u64)x; }
    if (df) { if (d.bits == 32) return bf(s.c == CS ? (float)sx(v, s.bits) : (float)zx(v, s.bits)); return putf(s.c == CS ? (double)sx(v, s.bits) : (double)zx(v, s.bits), d); }
    if (has("sat")) { __int128 x = s.c == CS ? (__int128)sx(v, s.bits) : (__int128)zx(v, s.bits); __int128 lo = d.c == CS ? -((__int128)1 << (d.bits - 1)) : 0, hi2 = d.c == CS ? ((__int128)1 << (d.bits - 1)) - 1 : ((__int128)1 << d.bits) - 1; return (u64)(x < lo ? lo : x > hi2 ? hi2 : x); }
    return s.c == CS ? (u64)sx(v, s.bits) : zx(v, s.bits);
  }
  void need_full(u32 act) { if (act != 0xffffffffu) err("divergent .aligned instruction", act ? __builtin_ctz(act) : 0, "active mask %08x", act); }
  void cp_wait(int l, int n) { auto& v = w[cw].pend[l]; size_t q = 0; for (auto& p : v) if (p.group < w[cw].group[l] - n) { u32 o = p.dst - SH_BASE; if (p.sb) memcpy(&sm[o], (void*)p.src, p.sb); memset(&sm[o] + p.sb, 0, p.bytes - p.sb); for (int i = 0; i < p.bytes; i++) { SB& b = ssh[o + i]; b.pend = 0; b.init = 1; b.w = {epoch, w[cw].we, (u16)(cw * 32 + l)}; b.r1.be = b.r2.be = 0; } } else v[q++] = p; v.resize(q); }
  // executes one instruction for lanes act; returns nothing (control flow handled by run)
  void exec(Ins& in, u32 act) {
    Warp& W = w[cw];
    size_t first_src = 1; if (in.id == I_st || in.id == I_red || in.id == I_bar || in.id == I_barwarp || in.id == I_cpasync) first_src = 0; for (size_t i = first_src; i < in.a.size(); i++) usecheck(in.a[i], act);
#define L for (u32 m_ = act; m_; m_ &= m_ - 1) { int l = __builtin_ctz(m_);
#define E }
    switch (in.id) {
      case I_mov: if (in.a[0].k == O_VEC) { int n = in.a[0].v.size(), eb = in.t.bits / n; L u64 v = rd(in.a[1], l); for (int i = 0; i < n; i++) wr(in.a[0].v[i], l, zx(v >> (i * eb), eb), {CB, (u8)eb}); E } else if (in.a[1].k == O_VEC) { int n = in.a[1].v.size(), eb = in.t.bits / n; L u64 v = 0; for (int i = 0; i < n; i++) v |= zx(rd(in.a[1].v[i], l), eb) << (i * eb); wr(in.a[0], l, v, in.t); E } else L wr(in.a[0], l, rd(in.a[1], l), in.t.c == CP ? Ty{CU, 8} : in.t); E break;
      case I_ld: memop(in, act, false); break;
      case I_st: memop(in, act, true); break;
      case I_cvta: { bool to = in.o[1] == "to"; int sp = in.sp; L u64 v = rd(in.a[1], l); if (sp == SP_SHARED) v = to ? v - SH_WIN : v + SH_WIN; else if (sp == SP_LOCAL) v = to ? v - LO_WIN : v + LO_WIN; wr(in.a[0], l, v, in.t); E break; }
      case I_add: case I_sub: case I_mul: case I_mad: case I_fma: case I_div: case I_rem: case I_min: case I_max: case I_neg: case I_abs: { bool un = in.id == I_neg || in.id == I_abs; Ty dt = in.t; if (in.o[1] == "wide") dt.bits *= 2; bool m3 = in.id == I_mad || in.id == I_fma;
        L u64 a = rd(in.a[1], l), b = un ? 0 : rd(in.a[2], l), c = m3 ? rd(in.a[3], l) : 0; u64 r; if (in.t.x2) { Ty h = in.t; h.x2 = 0; h.bits = 16; r = zx(arith(in, h, a & 0xffff, b & 0xffff, c & 0xffff), 16) | zx(arith(in, h, a >> 16 & 0xffff, b >> 16 & 0xffff, c >> 16 & 0xffff), 16) << 16; } else r = arith(in, in.t, a, b, c); wr(in.a[0], l, r, dt); E break; }
      case I_shl: L u64 s = zx(rd(in.a[2], l), 32); u64 v = zx(rd(in.a[1], l), in.t.bits); wr(in.a[0], l, s >= in.t.bits ? 0 : v << s, in.t); E break;
      case I_shr: L u64 s = zx(rd(in.a[2], l), 32); u64 v = rd(in.a[1], l); if (in.t.c == CS) { s64 x = sx(v, in.t.bits); wr(in.a[0], l, (u64)(x >> std::min<u64>(s, in.t.bits - 1)), in.t); } else wr(in.a[0], l, s >= in.t.bits ? 0 : zx(v, in.t.bits) >> s, in.t); E break;
      case I_and: case I_or: case I_xor: { Ty t = in.t.c == CP ? Ty{CU, 8} : in.t; L u64 a = rd(in.a[1], l), b = rd(in.a[2], l); wr(in.a[0], l, in.id == I_and ? a & b : in.id == I_or ? a | b : a ^ b, t); E break; }
      case I_not: L u64 a = rd(in.a[1], l); wr(in.a[0], l, in.t.c == CP ? !a : ~a, in.t.c == CP ? Ty{CU, 8} : in.t); E break;
      case I_lop3: L u32 a = rd(in.a[1], l), b = rd(in.a[2], l), c = rd(in.a[3], l), r = 0; int lut = in.a[4].imm; for (int q = 0; q < 8; q++) if (lut >> q & 1) r |= (q & 4 ? a : ~a) & (q & 2 ? b : ~b) & (q & 1 ? c : ~c); wr(in.a[0], l, r, in.t); E break;
      case I_bfi: L int n = in.t.bits; u64 a = rd(in.a[1], l), b = rd(in.a[2], l); u64 p = rd(in.a[3], l) & 255, q = rd(in.a[4], l) & 255; u64 mk = 0; for (u64 z = p; z < p + q && z < (u64)n; z++) mk |= 1ull << z; wr(in.a[0], l, (b & ~mk) | (p < 64 ? (a << p) & mk : 0), in.t); E break;
      case I_bfe: L int n = in.t.bits; u64 a = zx(rd(in.a[1], l), n); u64 p = rd(in.a[2], l) & 255, q = rd(in.a[3], l) & 255; u64 r = p >= (u64)n ? 0 : a >> p; u64 e = std::min<u64>(q, p >= (u64)n ? 0 : n - p); r = zx(r, e ? e : 64) * (e != 0); if (in.t.c == CS && q) { u64 sb = std::min<u64>(p + q - 1, n - 1); if (a >> sb & 1) for (u64 z = std::min<u64>(q, n); z < (u64)n || z < e; z++) r |= 1ull << z; if (a >> sb & 1 && e < q) for (u64 z = e; z < (u64)n; z++) r |= 1ull << z; } wr(in.a[0], l, r, in.t); E break;
      case I_prmt: L u64 a = zx(rd(in.a[1], l), 32) | zx(rd(in.a[2], l), 32) << 32; u32 c = rd(in.a[3], l), r = 0; for (int q = 0; q < 4; q++) { u32 s = c >> (4 * q) & 15; u32 by = a >> (8 * (s & 7)) & 255; if (s & 8) by = by & 128 ? 255 : 0; r |= by << (8 * q); } wr(in.a[0], l, r, in.t); E break;
      case I_shf: L u64 v = zx(rd(in.a[1], l), 32) | zx(rd(in.a[2], l), 32) << 32; u64 s = zx(rd(in.a[3], l), 32); s = in.o[2] == "clamp" ? std::min<u64>(s, 32) : s & 31; wr(in.a[0], l, in.o[1] == "l" ? (v << s) >> 32 : v >> s, in.t); E break;
      case I_popc: L wr(in.a[0], l, __builtin_popcountll(zx(rd(in.a[1], l), in.t.bits)), {CU, 32}); E break;
      case I_bfind: { bool sh = in.o[1] == "shiftamt"; L u64 v = zx(rd(in.a[1], l), in.t.bits); if (in.t.c == CS && sx(v, in.t.bits) < 0) v = zx(~v, in.t.bits); u32 r = v ? 63 - __builtin_clzll(v) : 0xffffffffu; if (sh && v) r = in.t.bits - 1 - r; wr(in.a[0], l, r, {CU, 32}); E break; }
      case I_clz: L u64 v = zx(rd(in.a[1], l), in.t.bits); wr(in.a[0], l, v ? __builtin_clzll(v) - (64 - in.t.bits) : in.t.bits, {CU, 32}); E break;
      case I_brev: L u64 v = rd(in.a[1], l), r = 0; for (int q = 0; q < in.t.bits; q++) if (v >> q & 1) r |= 1ull << (in.t.bits - 1 - q); wr(in.a[0], l, r, in.t); E break;
      case I_setp: { const string& c = in.o[1]; L u64 a = rd(in.a[1], l), b = rd(in.a[2], l); bool r; if (in.t.c == CF || in.t.c == CBF) { double x = flush(getf(a, in.t), in.t, in.ftz), y = flush(getf(b, in.t), in.t, in.ftz); bool un = std::isnan(x) || std::isnan(y); string q = c; bool u = q.size() == 3 && q[2] == 'u'; if (u) q.resize(2); if (c == "num") r = !un; else if (c == "nan") r = un; else if (un) r = u; else r = q == "eq" ? x == y : q == "ne" ? x != y : q == "lt" ? x < y : q == "le" ? x <= y : q == "gt" ? x > y : x >= y; }
          else if (in.t.c == CS) { s64 x = sx(a, in.t.bits), y = sx(b, in.t.bits); r = c == "eq" ? x == y : c == "ne" ? x != y : c == "lt" ? x < y : c == "le" ? x <= y : c == "gt" ? x > y : x >= y; } else { u64 x = zx(a, in.t.bits), y = zx(b, in.t.bits); r = c == "eq" ? x == y : c == "ne" ? x != y : c == "lt" || c == "lo" ? x < y : c == "le" || c == "ls" ? x <= y : c == "gt" || c == "hi" ? x > y : x >= y; }
          bool r0 = r; if (in.a.size() > 3) { bool p = rd(in.a[3], l); if (in.a[3].neg) p = !p; const string& bo = in.o[2]; r = bo == "and" ? r && p : bo == "or" ? r || p : r != p; r0 = bo == "and" ? !r0 && p : bo == "or" ? !r0 || p : !r0 != p; } else r0 = !r; wr(in.a[0], l, r, {CU, 8}); if (in.a[0].r2 >= 0) { Opnd o; o.k = O_REG; o.r = in.a[0].r2; wr(o, l, r0, {CU, 8}); } E break; }
      case I_selp: L wr(in.a[0], l, rd(in.a[3], l) ? rd(in.a[1], l) : rd(in.a[2], l), in.t); E break;
      case I_cvt: if (in.t.x2) { Ty h = in.t; h.x2 = 0; h.bits = 16; L u64 hi = putf(asf(rd(in.a[1], l)), h), lo = putf(asf(rd(in.a[2], l)), h); wr(in.a[0], l, hi << 16 | lo, {CB, 32}); E } else L wr(in.a[0], l, convert(in, rd(in.a[1], l)), in.t); E break;
      case I_shfl: { u32 mm = 0; bool b64 = false; (void)b64; u64 src[32]; L src[l] = zx(rd(in.a[1], l), 32); mm = rd(in.a[4], l); if (mm != act) { err("shuffle mask differs from active lanes", l, "membermask %08x active %08x", mm, act); } E
        L u32 b = rd(in.a[2], l), c = rd(in.a[3], l); int seg = c >> 8 & 31, cl = c & 31, mx = (l & seg) | (cl & ~seg), mn = l & seg, j = l; bool p; const string& md = in.o[2]; b &= 31; if (md == "up") { j = l - b; p = j >= mx; } else if (md == "down") { j = l + b; p = j <= mx; } else if (md == "bfly") { j = l ^ b; p = j <= mx; } else { j = mn | (b & ~seg); p = j <= mx; } if (!p) j = l; if (!(act >> j & 1)) { err("shuffle reads inactive lane", l, "lane %d", j); wr(in.a[0], l, 0x7fffffff, {CB, 32}); } else wr(in.a[0], l, src[j], {CB, 32}); if (in.a[0].r2 >= 0) { Opnd o; o.k = O_REG; o.r = in.a[0].r2; wr(o, l, p, {CU, 8}); } E break; }
      case I_vote: { u32 b = 0; L bool p = rd(in.a[1], l); if (in.a[1].neg) p = !p; b |= (u32)p << l; u32 mm = rd(in.a[2], l); if (mm != act) err("vote mask differs from active lanes", l, "membermask %08x active %08x", mm, act); E const string& md = in.o[2]; L wr(in.a[0], l, md == "ballot" ? b : md == "any" ? b != 0 : md == "all" ? b == act : (b == act || b == 0), md == "ballot" ? Ty{CB, 32} : Ty{CU, 8}); E break; }
      case I_activemask: L wr(in.a[0], l, act, {CB, 32}); E break;
      case I_barwarp: { L u32 mm = rd(in.a[0], l); if (mm != act) { err("bar.warp.sync mask differs from active lanes", l, "membermask %08x active %08x", mm, act); break; } E if (act == (W.live & ~W.exited)) W.we++; break; }
      case I_cpasync: {
        if (in.o[2] == "commit_group") { L W.group[l]++; E break; } if (in.o[2] == "wait_group") { int n = in.a[0].imm; L cp_wait(l, n); E break; } if (in.o[2] == "wait_all") { L W.group[l]++; cp_wait(l, 0); E break; } if (in.o[2] != "ca" && in.o[2] != "cg") die("unsupported %s", in.text.c_str());
        u64 ad[32], gd[32]; int n = 0; u32 ok = 0, gok = 0; L u64 d = addr(in.a[0], l), s = addr(in.a[1], l); n = in.a[2].imm; int sb = in.a.size() > 3 && in.a[3].k != O_NONE ? (int)rd(in.a[3], l) : n; ad[l] = d; gd[l] = s; if (s % n) err("misaligned cp.async source", l, "%llx", (unsigned long long)s); if (sb < 0 || sb > n) err("cp.async src-size", l, "%d", sb);
          bool o = true; if (sb) { u64 e0 = errors; o = g_acc(s, sb == n ? n : 1, false, l); if (o && sb != n) o = g_acc(s + sb - 1, 1, false, l); (void)e0; gok |= 1u << l; } if (!o) sb = 0; if (!s_acc(d, n, true, l)) continue; ok |= 1u << l; for (int i = 0; i < n; i++) { SB& b = ssh[d - SH_BASE + i]; b.pend = 1; b.pown = cw * 32 + l; sm[d - SH_BASE + i] = 0xff; } W.pend[l].push_back({(u32)d, s, n, sb, W.group[l]}); E
        if (ok) { banks(ad, ok, n); u64 a = in.waves, b = in.ideal; if (gok) { sectors(gd, gok, n); in.waves = a; in.ideal = b; } } break; }
      case I_ldmatrix: { need_full(act); int nm = in.o[4] == "x4" ? 4 : in.o[4] == "x2" ? 2 : 1; bool tr = std::find(in.o.begin(), in.o.end(), "trans") != in.o.end(); static u16 m[4][8][8];
        for (int i = 0; i < nm; i++) { int cnt[32] = {0}, mx = 0; std::set<u64> words; for (int r = 0; r < 8; r++) { int l = i * 8 + r; u64 a = addr(in.a[1], l); memset(m[i][r], 0xff, 16); if (s_acc(a, 16, false, l)) memcpy(m[i][r], &sm[a - SH_BASE], 16); for (int q = 0; q < 4; q++) if (words.insert(a / 4 + q).second) mx = std::max(mx, ++cnt[(a / 4 + q) & 31]); } in.waves += mx; in.ideal++; }
        L for (int i = 0; i < nm; i++) { int a = l >> 2, b = (l & 3) * 2; u32 lo = tr ? m[i][b][a] : m[i][a][b], hi = tr ? m[i][b + 1][a] : m[i][a][b + 1]; wr(in.a[0].k == O_VEC ? in.a[0].v[i] : in.a[0], l, lo | hi << 16, {CB, 32}); } E break; }
      case I_mma: { need_full(act); if (in.o[3] != "m16n8k16" && in.o[3] != "m16n8k8") die("unsupported %s", in.text.c_str()); int K = in.o[3] == "m16n8k16" ? 16 : 8; Ty ty; parse_ty(in.o[7], ty); if (in.o[6] != "f32" || ty.bits != 16) die("unsupported %s", in.text.c_str()); float A[16][16], B[16][8]; static float D[16][8];
        for (int l = 0; l < 32; l++) { int g = l >> 2, t = (l & 3) * 2; for (int q = 0; q < K / 4; q++) { u64 v = rd(in.a[1].v[q], l); for (int e = 0; e < 2; e++) A[g + (q & 1) * 8][t + (q >> 1) * 8 + e] = getf(v >> (16 * e), ty); } for (int q = 0; q < K / 8; q++) { u64 v = rd(in.a[2].k == O_VEC ? in.a[2].v[q] : in.a[2], l); for (int e = 0; e < 2; e++) B[t + q * 8 + e][g] = getf(v >> (16 * e), ty); } }
        for (int i = 0; i < 16; i++) { double acc[8] = {0}; for (int q = 0; q < K; q++) { double a = A[i][q]; for (int j = 0; j < 8; j++) acc[j] += a * B[q][j]; } for (int j = 0; j < 8; j++) D[i][j] = 0, D[i][j] = (float)acc[j]; int l0 = (i & 7) * 4; for (int t = 0; t < 4; t++) for (int e = 0; e < 2; e++) { int l = l0 + t, q = (i >> 3) * 2 + e; wr(in.a[0].v[q], l, bf((float)((double)asf(rd(in.a[3].v[q], l)) + acc[t * 2 + e])), {CF, 32}); } }
        break; }
      case I_atom: case I_red: { bool at = in.id == I_atom; Opnd& m = in.a[at ? 1 : 0]; Opnd& s = in.a[at ? 2 : 1]; string op = "add"; for (auto& x : in.o) if (x == "add" || x == "min" || x == "max" || x == "exch" || x == "cas" || x == "and" || x == "or" || x == "xor" || x == "inc") op = x; int n = in.t.bytes(); u64 ad[32]; u32 ok = 0; int spc = 0;
        L u64 a = addr(m, l); int sp = space(in.sp, a); spc = sp; ad[l] = a; u8* p; if (sp == SP_SHARED) { u64 o = a - SH_BASE; if (o + n > smem_size) { err("shared out of bounds", l, "atomic"); continue; } for (int i = 0; i < n; i++) if (!ssh[o + i].init) { err("uninitialised shared read", l, "atomic smem+%llu", (unsigned long long)o); break; } p = &sm[o]; } else { if (!g_acc(a, n, false, l, true) || !g_acc(a, n, true, l, true)) continue; p = (u8*)a; } ok |= 1u << l; u64 old = 0; memcpy(&old, p, n); u64 v = rd(s, l), r;
          if (in.t.x2) { Ty h = in.t; h.x2 = 0; h.bits = 16; r = putf(getf(old & 0xffff, h) + getf(v & 0xffff, h), h) | putf(getf(old >> 16 & 0xffff, h) + getf(v >> 16 & 0xffff, h), h) << 16; } else if (in.t.c == CF || in.t.c == CBF) { double x = getf(old, in.t), y = getf(v, in.t); r = putf(op == "add" ? (in.t.bits == 32 ? (double)((float)x + (float)y) : x + y) : op == "min" ? fmin(x, y) : op == "max" ? fmax(x, y) : y, in.t); if (op == "exch") r = v; } else { s64 x = sx(old, in.t.bits), y = sx(v, in.t.bits); u64 ux = zx(old, in.t.bits), uy = zx(v, in.t.bits); r = op == "add" ? old + v : op == "min" ? (in.t.c == CS ? (u64)std::min(x, y) : std::min(ux, uy)) : op == "max" ? (in.t.c == CS ? (u64)std::max(x, y) : std::max(ux, uy)) : op == "and" ? old & v : op == "or" ? old | v : op == "xor" ? old ^ v : op == "inc" ? (ux >= uy ? 0 : ux + 1) : v; if (op == "cas") { r = ux == uy ? rd(in.a[3], l) : old; } } memcpy(p, &r, n); if (at) wr(in.a[0], l, old, in.t); E if (ok && spc == SP_GLOBAL) sectors(ad, ok, n); break; }
      case I_math: L double x = flush(getf(rd(in.a[1], l), in.t), in.t, in.ftz), r; const string& o = in.op; r = o == "ex2" ? exp2(x) : o == "lg2" ? log2(x) : o == "rcp" ? 1.0 / x : o == "sqrt" ? sqrt(x) : o == "rsqrt" ? 1.0 / sqrt(x) : o == "sin" ? sin(x) : o == "cos" ? cos(x) : tanh(x); wr(in.a[0], l, putf(flush(r, in.t, in.ftz), in.t), in.t); E break;
      case I_nop: break;
      case I_trap: err("trap", __builtin_ctz(act), "trap executed"); W.exited |= act; break;
      default: die("unimplemented %s", in.text.c_str());
    }
  }
  bool run_warp() {   // until barrier or exit; true if finished
    Warp& W = w[cw];
    for (;;) {
      while (!W.st.empty() && ((W.st.back().mask & ~W.exited) == 0 || W.st.back().pc == W.st.back().rpc)) W.st.pop_back();
      if (W.st.empty()) return true;
      auto& f = W.st.back(); u32 mask = f.mask & ~W.exited; Ins& in = k->ins[f.pc]; ci = &in; winstr++; u32 act = mask;
      if (in.pred >= 0) { u32 bad = mask & ~W.def[in.pred]; if (bad) err("uninitialised predicate", __builtin_ctz(bad), "%s", ""); u32 p = 0; for (u32 m = mask; m; m &= m - 1) { int l = __builtin_ctz(m); p |= (u32)(W.reg[in.pred * 32 + l] != 0) << l; } act &= in.pneg ? ~p : p; }
      in.execs++; in.lanes += __builtin_popcount(act);
      if (in.id == I_bra) { u32 nt = mask & ~act; if (!act) f.pc++; else if (!nt) f.pc = in.target; else { int pc = f.pc, rpc = in.rpc; if (f.rpc == rpc) { W.st.pop_back(); } else f.pc = rpc; W.st.push_back({pc + 1, rpc, nt}); W.st.push_back({in.target, rpc, act}); } continue; }
      if (in.id == I_ret) { W.exited |= act; f.pc++; if (act) for (u32 m = act; m; m &= m - 1) { int l = __builtin_ctz(m); if (!W.pend[l].empty()) { err("cp.async never waited for", l, "%zu copies pending at exit", W.pend[l].size()); W.pend[l].clear(); } } continue; }
      if (in.id == I_bar) { f.pc++; if (!act) continue; u32 alive = W.live & ~W.exited; if (act != alive) err("divergent barrier", __builtin_ctz(act), "active %08x of live %08x", act, alive); W.atbar = true; W.barline = in.ptxline; return false; }
      f.pc++; if (act) exec(in, act);
      if (winstr > limit) die("instruction limit reached (endless loop?) at line %d", in.line);
    }
  }
  u64 limit = 2000000000ull;
  void launch(u32 smem_dyn) {
    nthr = block[0] * block[1] * block[2]; nw = (nthr + 31) / 32; dyn_off = (k->static_smem + 127) / 128 * 128; smem_size = dyn_off + smem_dyn; sm.resize(smem_size + 16); ssh.resize(smem_size + 16); w.resize(nw); launch_ep = ++epoch;
    if (k->maxntid && nthr > k->maxntid) err("launch bounds exceeded", 0, "%d > %d", nthr, k->maxntid);
    for (cta[2] = 0; cta[2] < grid[2]; cta[2]++) for (cta[1] = 0; cta[1] < grid[1]; cta[1]++) for (cta[0] = 0; cta[0] < grid[0]; cta[0]++) {
      blk++; epoch++; std::fill(sm.begin(), sm.end(), 0xff); memset((void*)ssh.data(), 0, ssh.size() * sizeof(SB));
      for (int i = 0; i < nw; i++) { Warp& W = w[i]; W.reg.assign((size_t)k->nreg * 32, 0x7fffffff7fffffffull); W.def.assign(k->nreg, 0); int n = std::min(32, nthr - i * 32); W.live = n == 32 ? ~0u : (1u << n) - 1; W.exited = 0; W.st = {{0, 1 << 30, W.live}}; W.atbar = false; W.we = 0; for (int l = 0; l < 32; l++) { W.pend[l].clear(); W.group[l] = 0; } W.local.assign((size_t)k->local * 32, 0xff); }
      vector<u8> done(nw, 0); for (;;) { int fin = 0, bar = 0; for (int q = 0; q < nw; q++) { int i = order ? nw - 1 - q : q; if (done[i]) { fin++; continue; } if (!w[i].atbar) { cw = i; if (run_warp()) { done[i] = 1; fin++; continue; } } bar++; }
        if (!bar) break; if (fin) { err("barrier after exit", 0, "%d warps wait, %d have exited", bar, fin); } int bl = -1; for (int i = 0; i < nw; i++) if (!done[i]) { if (bl >= 0 && bl != w[i].barline) err("warps at different barriers", 0, "ptx lines %d and %d", bl, w[i].barline); bl = w[i].barline; w[i].atbar = false; w[i].we++; } epoch++; bars++; } }
    ci = nullptr;
  }
};
struct Mod { string text; std::map<string, std::unique_ptr<Kernel>> ks; std::map<string, Sym> mods; };
static std::map<string, Mod> modules; static string g_err, g_text; static int g_arch = 80, g_order = 0; static u32 keep_epoch = 1, keep_blk = 0;
static Kernel* get_kernel(const string& name, Mod** mo) { for (auto& p : modules) { Mod& m = p.second; auto f = m.ks.find(name); if (f != m.ks.end()) { *mo = &m; return f->second.get(); } size_t q = m.text.find(".entry " + name + "("); if (q == string::npos) continue; Parser ps; auto kp = ps.parse(m.text, name); for (auto& s : ps.modsyms) m.mods.insert(s); *mo = &m; return (m.ks[name] = std::move(kp)).get(); } die("no module has the entry %s", name.c_str()); }
namespace ptx {
KernelLimits kernel_limits(const string& entry) { Mod* m; Kernel* k = get_kernel(entry, &m); return {k->maxntid ? (u32)k->maxntid : 1024u, k->static_smem}; }
void report(const string& kind, const string& message) { auto& e = all_errs[kind + message]; e.first++; e.second = kind + ": " + message; }
void launch(const string& entry, const Geometry& g, const void* const* args) { Mod* m; Kernel* k = get_kernel(entry, &m); auto M = std::make_unique<Machine>(); M->epoch = keep_epoch; M->blk = keep_blk; M->k = k; M->mods = &m->mods; M->order = g_order;
  M->pbuf.assign(k->params.empty() ? 8 : k->poff.back() + k->params.back().second + 8, 0); for (size_t i = 0; i < k->params.size(); i++) memcpy(&M->pbuf[k->poff[i]], args[i], k->params[i].second); for (int i = 0; i < 3; i++) { M->grid[i] = g.grid[i]; M->block[i] = g.block[i]; }
  try { M->launch(g.dynamic_shared_bytes); } catch (std::exception& e) { if (M->ci) die("%s [ptx %d: %.100s]", e.what(), M->ci->ptxline, M->ci->text.c_str()); throw; } keep_epoch = M->epoch + 1; keep_blk = M->blk; }
}
extern "C" {
void ptx_set_architecture(int a) { g_arch = a; }
int ptx_architecture() { return g_arch; }
int ptx_load_module(const char* name, const char* text) { Mod& m = modules[name]; m = Mod{}; m.text = text; return 0; }
const char* ptx_error() { return g_err.c_str(); }
void ptx_register_buffer(const void* d, u64 n, int ro, int init) { last_buf = nullptr; Buf& b = bufs[(u64)d]; b.a = (u64)d; b.n = n; b.readonly = ro; b.init.assign(n, init); b.sh.assign(n / 2 + 1, GB{}); }
void ptx_initialise(const void* d, u64 n) { Buf* b = find_buf((u64)d); if (b) for (u64 i = (u64)d - b->a; i < (u64)d - b->a + n && i < b->n; i++) b->init[i] = 1; }
void ptx_set_reverse_order(int r) { g_order = r; }
void ptx_reset() { bufs.clear(); last_buf = nullptr; all_errs.clear(); for (auto& m : modules) for (auto& k : m.second.ks) for (auto& in : k.second->ins) in.execs = in.lanes = in.waves = in.ideal = in.bytes = 0; }
int ptx_launch(const char* entry, const u32* grid, const u32* block, u32 dyn, const void* const* args) { try { ptx::launch(entry, {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dyn}, args); return 0; } catch (std::exception& e) { g_err = e.what(); return 1; } }
const char* ptx_reports() { g_text.clear(); for (auto& e : all_errs) g_text += e.second.second + " (x" + std::to_string(e.second.first) + ")\n"; return g_text.c_str(); }
const char* ptx_counters() { g_text.clear(); for (auto& m : modules) for (auto& k : m.second.ks) for (auto& in : k.second->ins) if (in.execs) { string op; for (auto& x : in.o) op += (op.empty() ? "" : ".") + x; bool sec = in.bytes > 0; char b[600]; snprintf(b, 600, "%s\t%d\tline:%d\t%s\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\n", k.first.c_str(), in.ptxline, in.line, op.c_str(), (unsigned long long)in.execs, (unsigned long long)(sec ? 0 : in.waves), (unsigned long long)(sec ? 0 : in.ideal), (unsigned long long)(sec ? in.waves : 0), (unsigned long long)(sec ? in.ideal : 0), (unsigned long long)in.bytes); g_text += b; } return g_text.c_str(); }
}
