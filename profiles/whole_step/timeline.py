import csv,sys,collections
ev=collections.defaultdict(dict)
for r in csv.DictReader(open(sys.argv[1])):
    ev[int(r['event']),int(r['group'])][int(r['sm'])]=int(r['ns'])
nl=(max(e for e,_ in ev))//16
names={0:'x normed',1:'qkv sent',2:'attn/merge done',3:'attn gathered',4:'o done',5:'x2 normed',6:'act gathered',7:'down done',8:'gu tile 0',9:'gu tile 1',10:'gu tile 2',11:'gu tile 3',12:'gu tile 4',14:'down product'}
acc=collections.defaultdict(list)
for l in range(4,nl-1):
    base=max(ev[(l-1)*16+7,0].values())
    for e in range(16):
        for g in range(2):
            d=ev.get((l*16+e,g))
            if d:
                v=sorted(d.values())
                acc[e,g].append((v[0]-base,v[len(v)//2]-base,v[-1]-base,len(v)))
for e in [0,1,2,3,4,5,8,9,10,11,12,6,14,7]:
  for g in (0,1):
    v=acc.get((e,g))
    if not v: continue
    m=[sum(x[i] for x in v)/len(v)/1000 for i in range(3)]
    print(f"{names[e]:18s} group {g}  n={v[0][3]:3d}  first {m[0]:7.2f}  median {m[1]:7.2f}  last {m[2]:7.2f} us")
