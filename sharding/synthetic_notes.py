"""The words of the synthetic hospital: illnesses, reasons for admission, sentences of every note type.

A template is a `str.format` string that `sharding.synthetic.Scribe` fills in. A field is, in this order: a
fact of the stay (`{age_phrase}`, `{he}`), a slot of GRADED, an entry of LEXICON, a choice written on the spot
(`{mild|moderate}`), or a range of whole numbers (`{60-95}`). What a field stands for may hold fields itself.

GRADED is where the text tells the truth about the patient. Each slot belongs to one latent dial (`frailty`,
`isolation`, `neglect`, `burden`, `instability`, `visits`, `acuity`; high is bad) and lists its sentences from
the best to the worst. No sentence names an outcome: what predicts is spread over some thirty such slots.

The file is long because it is vocabulary: a language model needs something to learn.
"""

# ruff: noqa: E501 (one sentence a line, however long)

from __future__ import annotations

from typing import NamedTuple


class Condition(NamedTuple):
    """A chronic illness: how common at 65, how that grows with age (log odds a decade), how heavily it weighs."""

    icd9: str
    prevalence: float
    age_slope: float
    weight: float
    history: tuple[str, ...]
    medicines: tuple[str, ...]


class Problem(NamedTuple):
    """A reason for admission; `needs` names the condition without which it does not occur ("" for none)."""

    icd9: str
    service: str
    needs: str
    planned: bool
    complaint: tuple[str, ...]
    story: tuple[str, ...]
    course: tuple[str, ...]
    procedure: tuple[str, ...]

    def occurs(self, kind: str, conditions: tuple[str, ...]) -> bool:
        """Whether it may bring a patient with these conditions in, for an admission of this ADMISSION_TYPE."""
        return self.planned == (kind == "ELECTIVE") and (not self.needs or self.needs in conditions)


class Graded(NamedTuple):
    """Sentences by level, best first, and the dial that chooses the level."""

    dial: str
    levels: tuple[tuple[str, ...], ...]


def lines(text: str) -> tuple[str, ...]:
    """The sentences of a block, one a line (a backslash at the end carries on), without the indentation."""
    return tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())


def words(text: str) -> tuple[str, ...]:
    """The phrases of a block, which are separated by semicolons."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


def graded(dial: str, text: str) -> Graded:
    """A block whose levels are separated by `--` lines."""
    return Graded(dial, tuple(lines(level) for level in text.split("--\n")))


NONE = ("None",)

CONDITIONS: dict[str, Condition] = {
    "hypertension": Condition("4019", 0.60, 0.3, 0.2,
        ("Hypertension", "HTN", "Essential hypertension, on {two|three} agents", "Longstanding hypertension"),
        ("Lisinopril {5|10|20|40} mg PO DAILY", "Amlodipine {5|10} mg PO DAILY",
         "Hydrochlorothiazide {25|50} mg PO DAILY")),
    "heart failure": Condition("4280", 0.24, 0.5, 1.2,
        ("Congestive heart failure, EF {20-55}%", "CHF (systolic, EF {20-45}%)",
         "Chronic diastolic heart failure", "Ischemic cardiomyopathy with EF of {20-40}%"),
        ("Furosemide {20|40|80} mg PO {DAILY|BID}", "Carvedilol 6.25 mg PO BID",
         "Spironolactone {25|50} mg PO DAILY", "Torsemide {20|40} mg PO DAILY")),
    "copd": Condition("49121", 0.22, 0.2, 1.0,
        ("COPD, on home oxygen at {1-4} liters", "COPD with FEV1 {30-70}% predicted",
         "Emphysema", "Chronic obstructive pulmonary disease, {30-80} pack years"),
        ("Tiotropium Bromide 18 mcg inhaled DAILY", "Fluticasone-Salmeterol {250|500}/50 one puff BID",
         "Albuterol nebulizer every {4|6} hours as needed", "Prednisone {5|10|20} mg PO DAILY")),
    "diabetes": Condition("25000", 0.33, 0.2, 0.6,
        ("Diabetes mellitus type 2, last A1c {6-11}.{0-9}%", "DM2 complicated by neuropathy and retinopathy",
         "Insulin dependent diabetes", "Type II diabetes, diet controlled until [**{past_year}**]"),
        ("Metformin {500|850|1000} mg PO BID", "Insulin glargine {8-44} units SC at bedtime",
         "Glipizide {5|10} mg PO DAILY", "Humalog insulin sliding scale")),
    "kidney disease": Condition("5853", 0.20, 0.4, 1.0,
        ("Chronic kidney disease stage {3|4}, baseline creatinine {1-2}.{1-9}", "CKD, Cr baseline "
        "{1-2}.{2-9}",
         "Renal insufficiency attributed to hypertensive nephrosclerosis"),
        ("Calcium acetate 667 mg PO TID with meals", "Calcitriol 0.25 mcg PO DAILY",
         "Sodium bicarbonate 650 mg PO BID")),
    "cirrhosis": Condition("5715", 0.07, -0.3, 1.4,
        ("Cirrhosis due to {alcohol|hepatitis C|fatty liver}, MELD {9-27}", "Alcoholic cirrhosis with "
        "ascites",
         "HCV cirrhosis complicated by varices and encephalopathy"),
        ("Lactulose 30 mL PO {TID|QID}, titrate to three bowel movements", "Rifaximin 550 mg PO BID",
         "Nadolol {20|40} mg PO DAILY")),
    "cancer": Condition("1990", 0.13, 0.2, 1.3,
        ("Metastatic {lung|colon|breast|pancreatic} cancer, on chemotherapy", "Non small cell lung "
        "cancer, stage {II|III}",
         "{Thyroid|Bladder|Renal cell} carcinoma diagnosed in [**{past_year}**]", "Lymphoma in partial "
         "remission"),
        ("Oxycodone {5|10} mg PO every {4|6} hours as needed for pain", "Ondansetron {4|8} mg PO every 8 "
        "hours as needed",
         "Dexamethasone {2|4} mg PO DAILY")),
    "atrial fibrillation": Condition("42731", 0.22, 0.6, 0.5,
        ("Atrial fibrillation on warfarin", "Paroxysmal AF, CHADS score of {1-5}", "Chronic atrial "
        "fibrillation"),
        ("Warfarin {1|2|3|4|5} mg PO DAILY, goal INR 2-3", "Metoprolol tartrate {12|25|50} mg PO BID",
         "Digoxin 0.125 mg PO DAILY", "Diltiazem {120|180|240} mg PO DAILY")),
    "coronary disease": Condition("41401", 0.32, 0.4, 0.5,
        ("CAD status post {two|three|four} vessel CABG", "Coronary artery disease with stent to the "
        "{LAD|RCA}",
         "Prior myocardial infarction in [**{past_year}**]"),
        ("Aspirin {81|325} mg PO DAILY", "Atorvastatin {20|40|80} mg PO DAILY", "Clopidogrel 75 mg PO DAILY",
         "Nitroglycerin 0.4 mg SL as needed for chest pain")),
    "dementia": Condition("29410", 0.09, 1.1, 1.0,
        ("Dementia, likely Alzheimer type", "Vascular dementia", "Memory loss, MMSE {12-23} of 30"),
        ("Donepezil {5|10} mg PO at bedtime", "Memantine {5|10} mg PO BID")),
    "depression": Condition("311", 0.22, -0.1, 0.4,
        ("Depression", "Depression and anxiety", "Bipolar disorder, followed by psychiatry"),
        ("Sertraline {50|100} mg PO DAILY", "Citalopram {10|20|40} mg PO DAILY", "Trazodone 50 mg PO at "
        "bedtime")),
    "hypothyroidism": Condition("2449", 0.14, 0.1, 0.1,
        ("Hypothyroidism", "Hashimoto thyroiditis", "Status post thyroidectomy"),
        ("Levothyroxine {25|50|75|88|100|125} mcg PO DAILY",)),
    "old stroke": Condition("43889", 0.11, 0.5, 0.7,
        ("CVA in [**{past_year}**] with residual {left|right} sided weakness", "Prior stroke without "
        "deficits",
         "TIA {2-9} years ago"),
        ("Simvastatin {20|40} mg PO DAILY", "Aspirin-dipyridamole one capsule PO BID")),
    "arthritis": Condition("71590", 0.26, 0.3, 0.1,
        ("Osteoarthritis of both knees", "Rheumatoid arthritis", "Chronic low back pain", "Spinal stenosis"),
        ("Acetaminophen {500|650|1000} mg PO every 6 hours as needed", "Gabapentin {100|300|600} mg PO TID")),
    "reflux": Condition("53081", 0.25, 0.0, 0.1,
        ("GERD", "Gastroesophageal reflux disease", "Hiatal hernia", "Peptic ulcer disease, treated for "
        "H. pylori"),
        ("Omeprazole {20|40} mg PO DAILY", "Pantoprazole 40 mg PO {DAILY|BID}", "Ranitidine 150 mg PO BID")),
    "zoster": Condition("05319", 0.07, 0.3, 0.2,
        ("Herpes zoster of the {left|right} T{4-9} dermatome in [**{past_year}**], with post-herpetic "
        "neuralgia",
         "Shingles {1-12} years ago, no residual pain", "History of shingles involving the {left|right} "
         "flank",
         "Zoster ophthalmicus, treated with valacyclovir"),
        ("Pregabalin {50|75} mg PO BID", "Lidocaine 5% patch, 12 hours on and 12 hours off")),
}  # fmt: skip

PROBLEMS: dict[str, Problem] = {
    "CONGESTIVE HEART FAILURE": Problem("42823", "MEDICINE", "heart failure", False,
        ("shortness of breath", "dyspnea on exertion and leg swelling", "worsening edema", "weight gain "
        "and orthopnea"),
        lines("""
        {He} noted {3-14} days of increasing dyspnea, {two|three|four} pillow orthopnea and {10-30} lbs of weight gain.
        Over the past week {he} became unable to climb one flight of stairs and slept in a recliner.
        In the clinic {he} was found to have crackles half way up and was sent to the emergency department.
        {He} ate {salty takeout food|canned soup|ham} over the {holiday|weekend} and woke up gasping for air."""),
        lines("""
        {He} was diuresed with IV furosemide {40-120} mg {BID|TID}, with net negative {3-12} liters during the stay.
        A furosemide drip was started at {5-15} mg per hour; metolazone was added on hospital day {2-4}.
        BNP was {900-9800}. Beta blocker was held at first and restarted before discharge. ACE inhibitor was continued.
        The trigger was felt to be {dietary indiscretion|rapid atrial fibrillation|ischemia|uncontrolled blood pressure}."""),
        ("None", "Right heart catheterization", "Thoracentesis, {800-1600} cc of straw colored fluid "
        "removed")),
    "CHRONIC OBST PULM DISEASE": Problem("49121", "MEDICINE", "copd", False,
        ("shortness of breath", "cough and wheezing", "increased sputum", "respiratory distress"),
        lines("""
        {He} had {2-8} days of productive cough with {yellow|green|white} sputum and used the nebulizer every two hours.
        EMS found {him} tripoding with oxygen saturation of {76-88}% on room air and gave nebulizers and solumedrol.
        Symptoms began after a grandchild visited with a cold; there was no fever and no hemoptysis."""),
        lines("""
        {He} received methylprednisolone, then a prednisone taper, with azithromycin for {5|7} days.
        BiPAP was needed for the first {6-30} hours; blood gas improved to 7.{32-40}/{42-60}/{60-90}.
        Chest film showed hyperinflation without consolidation. Nebulizers were spaced to every six hours."""),
        ("None", "Non-invasive ventilation", "Endotracheal intubation")),
    "PNEUMONIA": Problem("486", "MEDICINE", "", False,
        ("fever and cough", "shortness of breath", "cough, chills and malaise", "pleuritic pain"),
        lines("""
        {He} reported {2-6} days of fever to {101-103}.{0-9}, rigors and cough productive of {rusty|brown|green} sputum.
        At the {nursing facility|walk-in clinic|urgent care center} a {left|right} lower lobe infiltrate was seen on film.
        {He} was treated as an outpatient with levofloxacin but became more dyspneic and confused."""),
        lines("""
        {He} was treated with ceftriaxone and azithromycin, broadened to vancomycin and cefepime for {2-5} days.
        Sputum grew {Streptococcus pneumoniae|oral flora only|MRSA|Haemophilus influenzae}; legionella antigen negative.
        Oxygen was weaned from {3-6} liters to room air by hospital day {3-6}. A speech and swallow study was {normal|limited}."""),
        ("None", "Bronchoscopy with lavage", "PICC line placement", "Ultrasound guided thoracentesis")),
    "SEPSIS": Problem("0389", "MICU", "", False,
        ("hypotension", "fever and altered mental status", "rigors", "lethargy and decreased urine output"),
        lines("""
        {He} was found {confused|lethargic|febrile} at home by a {neighbor|visiting nurse|relative} and brought in by ambulance.
        In the ED temperature was {101-104}.{0-9}, pressure {72-98}/{38-60}, and {2-6} liters of saline were given.
        {He} had {2-5} days of dysuria, flank pain and chills, then could not keep down fluids."""),
        lines("""
        Blood cultures grew {E coli|Klebsiella|MSSA|Enterococcus|coagulase negative staph} in {one|two|four} of four bottles.
        {He} was resuscitated by the sepsis protocol, with a central line and norepinephrine for {6-60} hours.
        The source was felt to be {urinary|pulmonary|biliary|a skin and soft tissue infection}; antibiotics were narrowed."""),
        ("Central venous catheter placement", "Arterial line", "PICC line placement", "CT guided drainage "
        "of abscess")),
    "GASTROINTESTINAL BLEED": Problem("5789", "MEDICINE", "", False,
        ("melena", "bright red blood per rectum", "hematemesis", "weakness and dark stools"),
        lines("""
        {He} had {2-6} episodes of {black tarry stool|maroon stool|coffee ground emesis} and felt lightheaded on standing.
        {He} had been taking {ibuprofen|naproxen|high dose aspirin} for back pain. Hematocrit fell to {18-27} from {30-38}.
        INR was {2-6}.{0-9} on arrival; nasogastric lavage cleared after 500 cc; total blood loss is hard to estimate."""),
        lines("""
        {He} received {2-6} units of packed red cells and {1-4} units of plasma with appropriate response of hematocrit.
        EGD showed {a duodenal ulcer with visible vessel, clipped|gastritis|grade II varices, banded|no active bleeding}.
        Colonoscopy showed {diverticulosis|angioectasias, cauterized|internal hemorrhoids|two polyps}. Pantoprazole was given."""),
        ("Esophagogastroduodenoscopy", "EGD and colonoscopy", "Capsule endoscopy, estimated blood loss "
        "minimal")),
    "ACUTE RENAL FAILURE": Problem("5849", "MEDICINE", "kidney disease", False,
        ("abnormal laboratory values", "decreased urine output", "nausea and fatigue", "hyperkalemia"),
        lines("""
        Routine labs showed creatinine of {3-7}.{0-9} and potassium of {5-7}.{0-9}; {he} was told to come to the hospital.
        {He} had {3-7} days of poor intake and diarrhea while continuing diuretics and an ACE inhibitor."""),
        lines("""
        Renal ultrasound showed no hydronephrosis. Urine sediment had muddy brown casts. Fluids were given, ACE held.
        Hyperkalemia was treated with calcium, insulin, dextrose and kayexalate. Renal was consulted; dialysis {was not|was briefly} needed."""),
        ("None", "Temporary dialysis catheter placement", "Hemodialysis", "Renal ultrasound")),
    "LIVER FAILURE": Problem("5722", "HEPATOLOGY", "cirrhosis", False,
        ("confusion", "abdominal distension", "jaundice", "somnolence"),
        lines("""
        {He} became increasingly somnolent with asterixis after missing {lactulose|several bowel movements} for {2-5} days.
        {He} had tense ascites with {15-40} lbs of weight gain, early satiety and scrotal or leg edema.
        Family noticed yellow eyes and reversed sleep; {he} was drinking {a pint|two pints|six beers} daily until last week."""),
        lines("""
        Diagnostic paracentesis showed {60-900} white cells; ceftriaxone and albumin were given for peritonitis prophylaxis.
        Lactulose was titrated to four stools with clearing of encephalopathy. Large volume paracentesis removed {4-9} liters.
        Total bilirubin peaked at {4-22}.{0-9}; steroids were {deferred|not indicated|given for alcoholic hepatitis}."""),
        ("Paracentesis", "Large volume paracentesis", "EGD with variceal banding")),
    "STROKE/TIA": Problem("43491", "NEUROLOGY", "", False,
        ("right sided weakness", "slurred speech", "left facial droop", "sudden loss of vision"),
        lines("""
        {He} was last seen well at {6-11} pm; on waking {he} had {left|right} arm weakness and word finding difficulty.
        NIH stroke scale was {2-18}. CT showed no hemorrhage; {he} was outside the window for thrombolysis."""),
        lines("""
        MRI showed an acute infarct in the {left|right} {middle cerebral artery|thalamic|pontine|cerebellar} territory.
        Carotid studies showed {40-69}% stenosis. LDL was {70-180}; statin and antiplatelet therapy were started.
        Deficits {improved steadily|improved in part|were stable} with physical and occupational therapy."""),
        ("None", "Carotid angiography", "PEG tube placement")),
    "MYOCARDIAL INFARCTION": Problem("41071", "CARDIOLOGY", "coronary disease", False,
        ("chest pain", "chest pressure and diaphoresis", "jaw pain", "epigastric discomfort"),
        lines("""
        {He} developed {substernal|left sided|crushing} chest pressure at rest, {5-10}/10, radiating to the {left arm|jaw|back}.
        EKG showed ST depressions in {the lateral leads|V3 to V6|the inferior leads}; troponin was 0.{10-95} and rose."""),
        lines("""
        {He} was loaded with clopidogrel and heparin and taken to catheterization, which showed {70-95}% {LAD|RCA|circumflex} disease.
        A {bare metal|drug eluting} stent was placed with good flow. Peak CK was {300-3200}. Echo showed EF {25-60}%."""),
        ("Cardiac catheterization with stent placement", "Cardiac catheterization", "Intra-aortic balloon "
        "pump")),
    "HIP FRACTURE": Problem("82021", "ORTHOPAEDICS", "", False,
        ("fall with hip pain", "inability to bear weight", "left hip pain"),
        lines("""
        {He} tripped over a {rug|curb|pet|telephone cord} and fell on the {left|right} side, without loss of consciousness.
        {He} was found on the bathroom floor after {2-20} hours; films showed an intertrochanteric fracture."""),
        lines("""
        {He} went to the operating room on hospital day {1-3} for {hemiarthroplasty|open reduction and internal fixation}.
        Estimated blood loss was {150-500} cc; {one|two|three} units were transfused for postoperative anemia.
        Enoxaparin was started for prophylaxis; weight bearing as tolerated with a {walker|platform walker}."""),
        ("Open reduction internal fixation, estimated blood loss {150-500} cc", "Hemiarthroplasty, EBL "
        "{200-600} cc")),
    "DIABETIC KETOACIDOSIS": Problem("25012", "MEDICINE", "diabetes", False,
        ("hyperglycemia", "nausea and vomiting", "abdominal pain and polyuria"),
        lines("""
        Fingerstick was {critically high|over 500}; bicarbonate {8-16}, anion gap {18-32} and large ketones in the urine.
        {He} ran out of insulin {2-9} days ago and developed thirst, polyuria and vomiting."""),
        lines("""
        An insulin drip was run until the gap closed, then glargine was resumed. Potassium and phosphate were repleted.
        The diabetes service adjusted insulin; sugars ran {110-170} to {180-290} on the day before discharge."""),
        NONE),
    "CELLULITIS": Problem("6826", "MEDICINE", "", False,
        ("leg redness and pain", "foot ulcer", "swelling of the right leg", "painful rash"),
        lines("""
        {He} noted redness spreading from a {toe web|small cut|insect bite|chronic ulcer} over {2-6} days with fever.
        A vesicular rash on the trunk was thought to be herpes zoster at first, but swabs for varicella were negative."""),
        lines("""
        Vancomycin was given for {2-5} days with receding margins, then changed to {cephalexin|clindamycin|doxycycline}.
        Ultrasound excluded deep vein thrombosis. Wound care saw {him} and advised elevation and compression."""),
        ("None", "Bedside debridement, blood loss less than {5|10|20} cc", "Incision and drainage")),
    "BOWEL OBSTRUCTION": Problem("5609", "SURGERY", "", False,
        ("abdominal pain", "vomiting and distension", "no passage of flatus"),
        lines("""
        {He} had {12-72} hours of crampy abdominal pain, bilious vomiting and obstipation, after {two|three} prior laparotomies.
        CT showed dilated loops to {3-5}.{0-9} cm with a transition point in the {right lower quadrant|pelvis}."""),
        lines("""
        {He} was managed with nasogastric decompression and fluids. {Bowel function returned|The tube was clamped} on day {2-5}.
        {He} was taken for exploratory laparotomy and lysis of adhesions; estimated blood loss {50-400} cc, no bowel resected."""),
        ("Exploratory laparotomy, lysis of adhesions, blood loss {50-400} cc", "None")),
    "RAPID ATRIAL FIBRILLATION": Problem("42731", "CARDIOLOGY", "atrial fibrillation", False,
        ("palpitations", "lightheadedness", "rapid heart rate"),
        lines("""
        {He} felt fluttering in the chest for {3-48} hours; rate was {130-170} in the emergency room.
        {He} was noted to be tachycardic at {dialysis|the clinic|cardiac rehabilitation} and was sent in."""),
        lines("""
        A diltiazem drip and then oral metoprolol controlled the rate. TSH was normal. INR was {subtherapeutic|at goal}.
        {He} underwent TEE and cardioversion to sinus rhythm; amiodarone load was begun."""),
        ("None", "Transesophageal echocardiogram and cardioversion")),
    "FEVER;NEUTROPENIA": Problem("28800", "ONCOLOGY", "cancer", False,
        ("fever", "chills after chemotherapy", "mouth sores and fever"),
        lines("""
        {He} is {6-13} days after cycle {2-5} of chemotherapy and had a temperature of {100-103}.{4-9} at home.
        Absolute neutrophil count was {20-480}. There was mucositis but no cough, dysuria or diarrhea."""),
        lines("""
        Cefepime was given until counts recovered with filgrastim. Cultures stayed negative. Port site was clean.
        A dermatomal vesicular rash was treated with acyclovir as shingles; airborne precautions were lifted once crusted."""),
        ("None", "Port removal", "PICC line placement")),
    "SYNCOPE;TELEMETRY": Problem("7802", "MEDICINE", "", False,
        ("syncope", "fall with head strike", "dizziness"),
        lines("""
        {He} stood from the toilet, felt warm and lost consciousness for {10-90} seconds, witnessed by {a friend|a relative}.
        {He} fell on the stairs; there was no incontinence, no tongue biting, and head CT was negative."""),
        lines("""
        Telemetry showed {no events|brief pauses|premature beats}. Orthostatic vital signs were {positive|negative}.
        Blood pressure agents were reduced and {1-3} liters of saline given. Echocardiogram showed no critical valve disease."""),
        ("None", "Permanent pacemaker placement", "Loop recorder placement")),
    "PULMONARY EMBOLISM": Problem("41519", "MEDICINE", "", False,
        ("pleuritic chest pain", "acute dyspnea", "leg swelling and dyspnea"),
        lines("""
        {He} developed sudden dyspnea {5-20} days after {a long flight|knee surgery|a bad cold in bed}.
        CTA showed {segmental|bilateral|lobar} emboli with {mild|no|moderate} right heart strain."""),
        lines("""
        Heparin was started and bridged to warfarin, INR {2-3}.{0-9} at discharge. Leg ultrasound showed popliteal clot.
        {He} was treated with enoxaparin; a hypercoagulable evaluation was deferred to the clinic."""),
        ("None", "IVC filter placement")),
    "CORONARY ARTERY DISEASE/CABG": Problem("41401", "CARDIOTHORACIC", "coronary disease", True,
        ("exertional chest tightness", "abnormal stress test"),
        lines("""
        Catheterization for a positive stress test showed {two|three} vessel disease; {he} was referred for bypass surgery.
        {He} has had {3-12} months of exertional angina despite medical therapy and was admitted for elective surgery."""),
        lines("""
        {He} underwent bypass grafting times {two|three|four}; bypass time {60-120} minutes, blood loss {300-900} cc.
        {He} was extubated on the first night; chest tubes and wires were removed on postoperative day {2-4}."""),
        ("Coronary artery bypass grafting times {two|three|four}, estimated blood loss {300-900} cc",)),
    "KNEE OSTEOARTHRITIS/SDA": Problem("71536", "ORTHOPAEDICS", "arthritis", True,
        ("knee pain", "hip pain limiting walking"),
        lines("""
        {He} has failed injections, bracing and therapy and presents for elective total {knee|hip} replacement.
        Pain limits {him} to {one block|two blocks|household distances} and wakes {him} at night."""),
        lines("""
        Surgery was uncomplicated, blood loss {100-400} cc. Hematocrit nadir was {24-32}; no transfusion was required.
        The drain was removed on postoperative day {1-2} and continuous passive motion was begun."""),
        ("Total knee arthroplasty, estimated blood loss {100-400} cc", "Total hip arthroplasty, EBL "
        "{150-500} cc")),
    "COLON MASS/SDA": Problem("1539", "SURGERY", "", True,
        ("colon mass on screening", "anemia and change in bowel habits"),
        lines("""
        Screening colonoscopy found a {2-6} cm mass in the {cecum|sigmoid|ascending colon}; {he} presents for resection.
        Work up of iron deficiency found an adenocarcinoma; staging CT showed no distant disease."""),
        lines("""
        {He} underwent laparoscopic {right|left|sigmoid} colectomy, estimated blood loss {50-350} cc, without complication.
        Diet was advanced after flatus on postoperative day {2-4}; the epidural was removed and oral analgesics begun."""),
        ("Laparoscopic colectomy, estimated blood loss {50-350} cc",)),
    "AORTIC STENOSIS/SDA": Problem("4241", "CARDIOTHORACIC", "", True,
        ("dyspnea on exertion", "aortic stenosis"),
        lines("""
        Serial echocardiograms showed valve area of 0.{5-9} cm2; {he} was admitted for elective valve replacement.
        {He} has had progressive exertional dyspnea and one presyncopal episode while gardening."""),
        lines("""
        A {tissue|mechanical} aortic valve was placed; cross clamp {55-110} minutes, estimated blood loss {250-800} cc.
        Postoperative atrial fibrillation was treated with amiodarone. Pacing wires were removed without event."""),
        ("Aortic valve replacement, estimated blood loss {250-800} cc",)),
}  # fmt: skip

GRADED: dict[str, Graded] = {
    "mobility": graded("frailty", """
    {He} was ambulating independently without a device at discharge.
    {He} walked the hallway and climbed a flight of stairs with physical therapy without assistance.
    Out of bed independently with a steady gait; cleared by physical therapy for home.
    --
    {He} ambulated with a rolling walker and contact guard assistance.
    {He} walked {40-120} feet with a cane and supervision; physical therapy recommended home sessions.
    --
    {He} required maximum assistance of two to transfer from bed to chair.
    {He} was largely bedbound and needed a mechanical lift for transfers.
    Deconditioned; unable to stand without assistance of two persons."""),
    "baseline_function": graded("frailty", """
    At baseline {he} is independent in all activities of daily living and still {works|drives|gardens|swims}.
    {He} is active and exercises {two|three} times a week.
    --
    {He} uses a cane outdoors and needs some help with shopping and cleaning.
    At baseline {he} walks short distances and manages bathing alone.
    --
    At baseline {he} is wheelchair bound and needs help with bathing, dressing and toileting.
    {He} has had a functional decline over months with {two|three|several} falls and is now dependent in most activities."""),
    "nutrition": graded("frailty", """
    Appetite was good and {he} was eating full meals. Albumin {3-4}.{5-9}.
    Well nourished, tolerating a regular diet.
    --
    Appetite was fair; supplements were offered. Albumin {2-3}.{5-9}.
    --
    Poor oral intake with temporal wasting; albumin was {1-2}.{0-9} and nutrition followed.
    Malnutrition with weight loss of {12-35} lbs; tube feeding was {discussed|started|declined}. Albumin {1-2}.{0-9}."""),
    "cognition": graded("frailty", """
    Alert and oriented times three, conversant.
    Mental status was clear and coherent.
    --
    Oriented to person and place, forgetful at times.
    Mildly inattentive in the evenings but redirectable.
    --
    Confused and oriented to self only; required a sitter for agitation and sundowning.
    Delirium persisted at times, with inattention; needs reorientation and bed alarm."""),
    "skin": graded("frailty", """
    Skin warm, dry and intact.
    No pressure areas noted.
    --
    Skin thin with scattered ecchymoses on the arms.
    --
    Stage {two|three} sacral decubitus ulcer, dressed daily with {DuoDerm|Allevyn|wet to dry dressing}.
    Heels boggy, coccyx with open pressure ulcer; turned every two hours."""),
    "home": graded("isolation", """
    Lives with {his} {spouse} and two children in [**Location (un) {1-99}**], who are closely involved.
    Lives with {his} {spouse}, retired {occupation}; a supportive daughter visits daily.
    --
    Lives with {a roommate|an elderly sibling|a cousin}; works part time as a {occupation}.
    Lives in senior housing with some help from a neighbor.
    --
    Lives alone on the third floor without an elevator; no family nearby.
    Currently homeless, staying in a shelter; estranged from family.
    Lives alone in a rooming house, widowed, with little support."""),
    "helpers": graded("isolation", """
    {His} {spouse} was at the bedside, participated in teaching and will manage the medications.
    Family met with the team and arranged to stay with {him} around the clock.
    --
    A friend will check on {him} several times a week; visiting nurse referral was made.
    --
    There was no caregiver available at home and {he} declined services; social work was concerned.
    Social work could not reach any relative; {he} refused placement in rehabilitation."""),
    "follow_up": graded("isolation", """
    Appointment with Dr. {last_name} was made for {three|four|five} days after discharge and family will drive {him}.
    Follow up with the primary care physician is scheduled this week; {he} has the date in writing.
    --
    Please call the office of Dr. {last_name} at {phone} to arrange an appointment in {two|three} weeks.
    --
    {He} has no primary care physician; an appointment could not be arranged before discharge.
    {He} lacks transportation, and the earliest opening in the clinic is in {two|three} months."""),
    "adherence": graded("neglect", """
    {He} takes all medications as prescribed using a pillbox and keeps {his} appointments.
    {He} is adherent to diet and medication and weighs {himself} daily.
    --
    {He} reports missing an occasional dose and is unsure of the names of some pills.
    --
    {He} stopped taking {his} medications {one|two|three} weeks ago because of cost and missed {two|three|several} appointments.
    History of noncompliance with medications and diet; {he} ran out of refills and did not call.
    Noncompliant, left against medical advice from an outside hospital in [**{1-12}-{1-28}**]."""),
    "teaching": graded("neglect", """
    {He} verbalized understanding of all instructions and taught back the warning signs correctly.
    Teaching was done with good understanding; {he} asked thoughtful questions.
    --
    Teaching reinforced; {he} needs further reminders about diet and pills.
    --
    {He} showed poor insight into {his} illness and was not interested in teaching.
    Unable to teach back the medication changes; eager to leave and refused a new prescription for the pillbox."""),
    "habits": graded("neglect", """
    Never smoked, rare glass of wine, no illicit drugs.
    Quit tobacco {15-40} years ago; denies alcohol and drug use.
    --
    Smokes {five|ten} cigarettes a day, drinks socially.
    --
    Smokes {one|two} packs a day and drinks {six beers|a pint of vodka} daily; prior withdrawal seizures.
    Active {alcohol|heroin|cocaine} use, last {two|three} days before admission; declined detox referral."""),
    "state": graded("instability", """
    Good. Afebrile with stable vital signs, oxygen saturation {96-99}% on room air.
    Stable, feeling well, symptoms resolved, saturation {95-99}% on room air.
    Good, back to baseline and eager to go home.
    --
    Stable. Improved, though still fatigued; saturation {93-95}% on room air.
    Fair, hemodynamically stable and improved since admission.
    --
    Guarded. Still short of breath with minimal exertion, saturation {86-91}% on room air, on {2-4} liters.
    Fair to guarded; persistent tachycardia to the {one teens|120s} and borderline pressures.
    Tenuous but insisting on discharge; low grade temperature on the last evening."""),
    "lab_trend": graded("instability", """
    Creatinine returned to baseline and white count normalized. Hematocrit stable at {33-41}.
    All laboratory values were within normal limits on the day of discharge.
    --
    Creatinine was slightly above baseline and will be followed as an outpatient. Hematocrit {28-33}.
    White count trended down without reaching normal.
    --
    Creatinine continued to rise to {2-5}.{0-9} and sodium remained low at {122-130}. Hematocrit {21-27}.
    White count was still elevated at {13-22}.{0-9} on discharge; hyponatremia and anemia persisted."""),
    "residual": graded("instability", """
    By discharge {he} was pain free and without complaint.
    Symptoms resolved completely, lungs clear, no edema.
    --
    Mild residual symptoms were expected to resolve over the coming days.
    --
    {He} still had crackles at both bases and 2+ pitting edema, and remained above {his} dry weight.
    Pain remained poorly controlled with frequent requests for narcotics; nausea was ongoing.
    {He} had recurrent {fevers|dyspnea|vomiting} on the day before discharge, which settled with observation."""),
    "lines": graded("instability", """
    No lines or drains were needed at discharge; incision clean, dry and intact.
    All lines were removed. Voiding freely.
    --
    Dressing changes daily by visiting nurse.
    --
    Discharged with a PICC for {2-6} weeks of IV antibiotics and weekly labs.
    Wound with dehiscence and purulent drainage, packed twice a day; VAC in place.
    Indwelling Foley catheter after failed voiding trials; drain left in place with bulb suction."""),
    "pending": graded("instability", """
    No studies were pending at the time of discharge.
    --
    Final culture results were pending and will be followed by the team.
    --
    Blood cultures from the last day and a {biopsy|CT of the chest|repeat troponin} are pending and need urgent follow up.
    Repeat electrolytes and INR must be checked within two days; several issues were left unresolved."""),
    "visits": graded("visits", """
    {He} has not been hospitalized in many years.
    No recent hospitalizations. No surgery in the past year.
    --
    Last admission was about {7-11} months ago.
    {He} was admitted once in the past year.
    --
    {He} was discharged from this hospital {two|three|five} weeks ago and has had {three|four|five} admissions this year.
    {He} is well known to this service, with multiple recent hospitalizations and frequent emergency room visits."""),
    "recent": graded("visits", """
    {He} had been in {his} usual state of health until this presentation.
    --
    {He} was seen once in the emergency room this {spring|winter|fall} and sent home.
    --
    {He} was recently hospitalized at {hospital} for the same complaint and never fully recovered.
    {He} returns again with recurrent symptoms shortly after {his} last stay."""),
    "regimen": graded("burden", """
    {His} medical history is otherwise unremarkable.
    --
    {His} chronic conditions were stable during the stay.
    --
    {His} course was complicated by multiple comorbidities, with {four|five} services consulted and {twelve|fifteen} medications.
    Given {his} end stage disease, goals of care were discussed and palliative care was introduced."""),
    "appearance": graded("acuity", """
    Comfortable, pleasant, in no acute distress.
    Well appearing, sitting up and speaking in full sentences.
    --
    Uncomfortable, tired appearing, mildly tachypneic.
    Pale and diaphoretic but answering questions.
    --
    Ill appearing, obtunded, minimally responsive to sternal rub.
    Intubated and sedated, mottled extremities."""),
    "pressure": graded("acuity", """
    BP {118-142}/{62-80}, HR {66-86}, extremities warm.
    Hemodynamically stable off any vasoactive agent, HR {68-88}.
    --
    BP {94-108}/{50-60}, HR {96-112}, responsive to fluid boluses.
    --
    BP {68-84}/{34-46} on norepinephrine and vasopressin, HR {118-142}.
    Hypotensive despite {4-8} liters of fluid, on escalating doses of levophed and neosynephrine."""),
    "breathing": graded("acuity", """
    Breathing comfortably on room air, saturation {96-99}%.
    Lungs clear, on {one|two} liters nasal cannula.
    --
    On face mask at {40-60}% with saturation {91-94}%, some accessory muscle use.
    --
    Remains intubated on assist control, FiO2 {70|80|90|100}%, PEEP {10-16}, with worsening hypoxemia.
    Copious secretions, dyssynchronous with the ventilator, saturation {82-89}%."""),
    "lactate": graded("acuity", """
    Lactate {1-1}.{0-9}, pH 7.{37-43}, troponin negative.
    Lactate normal. INR {1-1}.{0-2}.
    --
    Lactate {2-3}.{0-9}, pH 7.{30-36}.
    --
    Lactate {6-14}.{0-9}, pH 7.{10-22}.
    Lactate rising to {5-12}.{0-9} with severe acidosis, INR {2-4}.{0-9}, platelets {18-70}."""),
    "urine": graded("acuity", """
    Voiding well, urine output {60-120} cc per hour.
    --
    Urine output {25-40} cc per hour, concentrated.
    --
    Anuric since midnight despite fluids; CVVH was discussed.
    Urine output less than {5|10|15} cc per hour; renal following for CVVH."""),
    "neuro": graded("acuity", """
    Awake, alert, moving all extremities, following commands.
    --
    Sleepy but arousable, following simple commands.
    --
    No purposeful movement, pupils sluggish, GCS {3-6}.
    Unresponsive off sedation, withdraws to pain only."""),
    "family_talk": graded("acuity", """
    Family updated by phone. Full code.
    Full code. No family issues.
    --
    Family in to visit, anxious, spoke with the team.
    --
    Family meeting held about grave prognosis; code status changed to DNR.
    Health care proxy called in; family aware that {he} is critically ill and may not survive."""),
    "film": graded("acuity", """
    No acute cardiopulmonary process.
    The lungs are clear. Heart size is normal. No effusion or pneumothorax.
    --
    Mild vascular congestion with small {left|right|bilateral} effusion and basilar atelectasis.
    Patchy {left|right} lower lobe opacity, which may represent pneumonia or aspiration.
    --
    Diffuse bilateral airspace opacities, worsened since the prior study, consistent with ARDS or severe edema.
    Endotracheal tube terminates {3-5} cm above the carina. Extensive bilateral consolidation."""),
    "icu_course": graded("acuity", """
    {He} was managed on the floor throughout.
    --
    {He} was observed in the step down unit for the first {24|36|48} hours.
    --
    {He} spent {3-8} days in the intensive care unit on pressors and mechanical ventilation."""),
}  # fmt: skip

# Slots that are said in the same words in all stays of a patient.
LASTING = ("home", "habits", "family_history", "allergy")

LEXICON: dict[str, tuple[str, ...]] = {
    "last_name": words("""
        [**Last Name (NamePattern1) {1-9999}**]; [**Last Name (NamePattern4) {1-9999}**]; [**Last Name
        (un) {1-999}**]; [**Last Name (STitle) {1-9999}**]; [**Doctor Last Name {1-999}**]; [**Known
        lastname {1-9999}**]; [**Name (NI) {1-9999}**]; [**Initials (NamePattern4) **]; [**Name6 (MD)
        {1-99}**]; [**Last Name{wrap}(un) {1-99}**]"""),
    "full_name": words("""
        [**First Name8 (NamePattern2) {1-9999}**] [**Last Name (NamePattern1) {1-9999}**]; [**Doctor First
        Name {1-999}**] [**Doctor Last Name {1-999}**]; [**Known firstname {1-99}**] [**Known lastname
        {1-9999}**]; [**First Name11 (Name Pattern1) {1-9999}**] [**Initial (NamePattern1) **].
        {last_name}"""),
    "wrap": ("\n",),
    "hospital": words("""
        [**Hospital1 {1-99}**]; [**Hospital {1-9999}**]; [**Hospital3 {1-999}**] Hospital; [**Hospital
        Ward Name {1-99}**]; an outside hospital in [**Location (un) {1-999}**]; [**University/College
        {1-9999}**] Medical Center"""),
    "phone": ("[**Telephone/Fax (1) {1-9999}**]", "([**{100-999}**]) [**{100-999}**]-[**{1000-9999}**]",
              "[**Pager number {1-999}**]"),
    "identifier": words("""
        [**Numeric Identifier {1-9999}**]; [**Clip Number (Radiology) {1-9999}**]; [**Medical Record
        Number {1-999}**]; [**Serial Number {1-999}**]; [**Unit Number {1-999}**]; [**MD Number(1)
        {1-999}**]; [**Job Number {1-9999}**]; [**Provider Number {1-999}**]; [**Social Security Number
        {1-99}**]"""),
    "place": words("""
        [**Location (un) {1-999}**]; [**Country {1-99}**]; [**State {1-50}**]; [**Street Address(2)
        {1-999}**]; [**Address(1) {1-999}**]; [**PO Box {1-99}**]; [**Company {1-999}**]"""),
    "when": words("""
        [**{year}-{1-12}-{1-28}**]; [**{1-12}-{1-28}**]; [**{1-12}/{1-28}**]; [**Month (only) {1-12}**];
        [**Month/Day ({1-4}) {1-99}**]; [**{year}**]; [**Date range (1) {1-99}**]; [**Holiday {1-99}**];
        [** **]; [**{100-9999}**]"""),
    "info": ("[**Dictator Info {1-999}**]", "[**Attending Info {1-999}**]", "[**Contact Info {1-999}**]"),
    "occupation": words("""
        teacher; machinist; nurse; carpenter; bookkeeper; bus driver; postal worker; cook; electrician;
        fisherman; librarian; seamstress; salesman; firefighter; janitor"""),
    "side": ("left", "right"),
    "relative": words("""
        mother; father; brother; sister; maternal aunt; paternal uncle; grandmother"""),
    "family_illness": words("""
        diabetes; coronary disease in {his} {fifties|sixties|seventies}; breast cancer; colon cancer at
        age {38-79}; stroke; hypertension; lung cancer, a smoker; dementia; shingles; kidney failure
        requiring dialysis; sudden death at age {35-60}; rheumatoid arthritis"""),
    "family_history": lines("""
    {Relative} with {family_illness}. {Relative} died of {family_illness}.
    {Relative} had {family_illness}; no family history of {clotting|sudden death|early heart disease|cancer}.
    Non-contributory.
    Significant for {family_illness} in {his} {relative}.
    No history of {cancer|stroke|heart disease} in first degree relatives. {Relative} with {family_illness}."""),
    "Relative": ("Mother", "Father", "Brother", "Sister", "Grandfather", "Daughter", "Son"),
    "denies": lines("""
    {He} denies {symptom}, {symptom} or {symptom}.
    {He} denied {symptom} and {symptom}. There was no {symptom}.
    Review of systems is negative for {symptom}, {symptom} and {symptom}.
    No {symptom}, no {symptom}. {He} endorses {symptom}.
    {He} reports {symptom} but denies {symptom}."""),
    "symptom": words("""
        chest pain; fever; chills; night sweats; headache; cough; hemoptysis; abdominal pain; nausea;
        vomiting; diarrhea; constipation; dysuria; hematuria; palpitations; blurry vision; numbness; rash;
        joint pain; sore throat; weight loss; orthopnea; leg swelling; blood
        loss"""),
    # One of several signs of the same thing, so that no single sentence is in every summary.
    "past": ("{visits}", "{recent}", "{visits} {recent}"),
    "frail": ("{nutrition}", "{baseline_function}", "{skin} {cognition}", "{cognition}"),
    "unsettled": ("{lab_trend}", "{residual}", "{lines}", "{pending}"),
    "aside": ("{regimen}", "{icu_course}", "{system}"),
    "advice": ("{instruction}", "{unsettled}"),
    "result": ("{labs}", "{image}"),
    "going_home": ("{teaching}", "{helpers}", "{teaching} {helpers}"),
    "allergy": words("""
        Patient recorded as having No Known Allergies to Drugs; Penicillins; Sulfa (Sulfonamide
        Antibiotics); Codeine / Morphine; Iodine and contrast; Percocet / Vicodin; Aspirin / Shellfish;
        Latex, adhesive tape; Lisinopril (cough)"""),
    "vaccination": lines("""
    Influenza vaccine given on {when}; pneumococcal vaccine up to date.
    Zoster vaccine (Zostavax) received in [**{past_year}**].
    No history of shingles; declined the zoster vaccine.
    Varicella in childhood. Tetanus vaccination current.
    Immunizations not up to date; never received shingles vaccination."""),
    "surgery": words("""
        Status post appendectomy; Cholecystectomy in [**{past_year}**]; Inguinal hernia repair,
        remote; Cataract surgery, bilateral; {Left|Right} knee arthroscopy; Tonsillectomy as a child;
        Nephrolithiasis; Gout; Obstructive sleep apnea on CPAP; Anemia of chronic disease; Hyperlipidemia; Glaucoma; Migraine; Psoriasis; Deep
        vein thrombosis in [**{past_year}**]; Diverticulosis; Osteoporosis"""),
    "exam": lines("""
    HEENT: {PERRL|EOMI}, oropharynx {clear|dry}. NECK: supple, JVP {6-12} cm. {exam_chest}
    GENERAL: {NAD|cachectic|obese}. NECK: no {lymphadenopathy|bruits|thyromegaly}. {exam_belly}
    {exam_belly}
    Vitals {96-99}.{0-9} {100-150}/{54-88} {62-104} {16-22}. {exam_chest} NEURO: {cognition}"""),
    "exam_chest": lines("""
    CV: regular rate and rhythm, normal S1 and S2, no {murmurs|rubs|gallops}. LUNGS: clear to auscultation.
    CV: irregular, {II|III}/VI systolic murmur at the {apex|base}. LUNGS: scattered {wheezes|rhonchi|crackles}.
    COR: distant heart sounds. PULM: decreased breath sounds at the {left|right} base."""),
    "exam_belly": lines("""
    ABD: soft, nontender, nondistended, bowel sounds {present|normoactive}. EXT: no clubbing, cyanosis or edema.
    ABD: obese, mild {epigastric|suprapubic|right upper quadrant} tenderness without guarding. EXT: {1+|2+|trace} edema.
    ABD: benign, no hepatosplenomegaly. EXT: warm and well perfused, pulses palpable."""),
    "labs": lines("""
    WBC-{5-16}.{0-9} RBC-{3-4}.{10-99} Hgb-{8-14}.{0-9} Hct-{25-42}.{0-9} MCV-{80-99} Plt Ct-{110-420}
    Glucose-{82-240} UreaN-{9-58} Creat-{creat} Na-{131-144} K-{3-5}.{0-9} Cl-{96-110} HCO3-{19-31}
    ALT-{12-90} AST-{14-96} AlkPhos-{45-160} TotBili-{0-1}.{1-9} Calcium-{8-9}.{0-9} Mg-{1-2}.{0-9}
    PT-{11-16}.{0-9} PTT-{24-40}.{0-9} INR(PT)-{1-2}.{0-9}
    URINE Blood-{NEG|SM|MOD} Nitrite-{NEG|POS} WBC-{0-50} Bacteri-{FEW|MOD|NONE}"""),
    "image": lines("""
    CXR: {film}
    ECG: sinus {rhythm|tachycardia|bradycardia} at {56-118}, no acute ST changes.
    TTE: LVEF {25-65}%, {mild|moderate|trace} mitral regurgitation, no pericardial effusion.
    CT ABDOMEN: no {free air|abscess|obstruction}; incidental {renal cyst|liver hemangioma|adrenal nodule}."""),
    "system": lines("""
    Blood sugars were covered with a sliding scale and home agents were resumed.
    Blood pressure was controlled with {metoprolol|amlodipine|lisinopril}; goal systolic less than 140.
    Prophylaxis was subcutaneous heparin and a proton pump inhibitor.
    Hematocrit drifted to {22-29} and {one|two} units were transfused without reaction.
    Delirium precautions were used and {Haldol|Seroquel|trazodone} was given at bedtime.
    Anticoagulation was held for the procedure and resumed with a heparin bridge.
    Urinary retention was treated with tamsulosin.
    Clostridium difficile toxin was {negative|positive, treated with metronidazole}.
    Potassium and magnesium were repleted daily.
    Thrush was treated with nystatin swish and swallow.
    A pulmonary nodule was seen and needs a repeat CT in six months.
    Antihypertensives were held on arrival and restarted one by one.
    Code status: {full code|DNR/DNI|full code, confirmed with the patient}."""),
    "instruction": lines("""
    You were admitted with {complaint}. Please take all of your medicines as listed.
    Weigh yourself every morning and call your doctor if weight goes up more than 3 lbs.
    Return to the emergency room for fever greater than 101, chest pain, trouble breathing or bleeding.
    Do not drive while taking narcotic pain medicine. Keep the incision clean and dry.
    Adhere to a 2 gm sodium diet. Fluid restriction 1500 cc.
    Your {warfarin|lisinopril|metoprolol|insulin} dose was changed; have your blood drawn on {when}."""),
    "over_the_counter": words("""
        Docusate sodium 100 mg PO BID; Senna 8.6 mg PO BID as needed for constipation; Multivitamin one
        tablet PO DAILY; Ferrous sulfate 325 mg PO DAILY; Folic acid 1 mg PO DAILY; Potassium chloride
        {10|20|40} mEq PO DAILY; Magnesium oxide 400 mg PO DAILY; Vitamin D 800 units PO DAILY"""),
    "plan": lines("""
    Continue {ceftriaxone|vancomycin|cefepime|current antibiotics}, day {2-9}; follow cultures and fever curve.
    Trend hematocrit every {six|eight|twelve} hours, type and screen active, transfuse for less than 21.
    Wean oxygen as tolerated, incentive spirometry, chest physical therapy.
    Diurese with a goal of negative {1-2} liters; check electrolytes twice a day.
    Hold {lisinopril|metformin|warfarin}; renally dose medications.
    Pain control with {oxycodone|a morphine PCA|acetaminophen}; bowel regimen.
    Advance diet as tolerated; speech and swallow evaluation.
    Physical therapy, out of bed to chair three times a day.
    Rate control with metoprolol; continue telemetry and aspirin.
    Follow up {echocardiogram|MRI|ultrasound|CT} and discuss with consultants.
    CIWA scale, thiamine, folate and multivitamin.
    DVT prophylaxis with heparin; pantoprazole; full precautions for falls."""),
    "event": lines("""
    No events overnight.
    Brief run of ventricular ectopy, asymptomatic, electrolytes repleted.
    Pulled out the {IV|nasogastric tube|oxygen} once; redirected.
    Low grade temperature to 100.{4-9}, cultures sent.
    Complained of {symptom}; the house officer was notified and evaluated {him}.
    Slept in short naps. Refused the evening medications.
    Transfused one unit without reaction.
    Nauseated after supper, given {Zofran|Compazine|Reglan} with good effect.
    Fingersticks {110-260}, covered per sliding scale."""),
    "nursing_line": lines("""
    CV: HR {60-110} {NSR|SR with rare PVCs|afib}, BP {100-150}/{50-80}, pulses palpable by Doppler.
    RESP: LS {clear|coarse|diminished at bases}, O2 {1-4}L NC, sats {92-99}%, coughing and deep breathing.
    GI: abd soft, +BS, {no stool|small brown stool x1|loose stool x3}, tolerating {clears|house diet|tube feeds}.
    GU: foley draining {clear yellow|amber|dark} urine, {30-110} cc/hr, BUN/Cr {12-50}/{creat}.
    NEURO: {A+Ox3|A+Ox2|lethargic but arousable}, MAE, c/o {incisional|back|no} pain, medicated with {Tylenol|Percocet|Dilaudid}.
    ID: Tmax {97-101}.{0-9}, WBC {5-17}.{0-9}, on {vanco|zosyn|levaquin|no abx}.
    ENDO: FS {90-240}, RISS as ordered.
    SOCIAL: {spouse} called, updated on plan of care by RN.
    ACCESS: {right|left} {IJ TLC|PICC|#20 PIV}, site clean, dressing changed on {when}."""),
    "respiratory_line": ("Ventilator mode: {CMV|PSV|SIMV}, tidal volume {380-600}, PEEP {5-12}, FiO2 "
    "{40-80}%.",
                         "Albuterol and Atrovent MDIs given every four hours. Suctioned for {thick "
                         "tan|white} secretions.",
                         "RSBI {40-140} this morning. {breathing}"),
    "impression": lines("""
    No change from prior.
    As described above.
    Clinical correlation is suggested.
    Findings discussed by telephone with Dr. {last_name} at the time of the study."""),
    "error_reason": ("Note entered on the wrong patient. ", "Entered in error, see next note. ", ""),
    "baby_feeding": ("taking {15-45} cc of {breast milk|Enfamil 20} every 3 hours", "breastfeeding well "
    "with good latch",
                     "on D10W at {60-80} cc/kg/day, NPO", "PG feeds over {30|60} min, small spits"),
    "baby_state": ("pink, active with cares, AFOF, temp stable in {open crib|isolette|warmer}",
                   "mild {grunting|retractions|tachypnea}, RR {40-74}, LS clear, on {room air|CPAP of 5}",
                   "{mild jaundice|no murmur|one spell, self resolved}, bili {4-12}.{0-9}, {phototherapy "
                   "started|no lights}"),
}  # fmt: skip

Template = tuple[tuple[str, str], ...]

DISCHARGE: Template = (
    ("Admission Date", "[**{admit_day}**]              Discharge Date:   [**{discharge_day}**]"),
    ("Date of Birth", "[**{birth_day}**]             Sex:   {sex}"),
    ("Service", "{service}"),
    ("Allergies", "{allergy}"),
    ("Attending", "{full_name}"),
    ("Chief Complaint", "{complaint}"),
    ("Major Surgical or Invasive Procedure", "{procedure}"),
    ("History of Present Illness",
     "This is {a|our} {age_phrase} {man} with {history} who presents with {complaint}. {story}\n"
     "{past} {adherence} {denies}"),
    ("Past Medical History", "{history_list}"),
    ("Social History", "{home} {habits}"),
    ("Family History", "{family_history}"),
    ("Physical Exam", "{exam}"),
    ("Pertinent Results", "[**{admit_day}**] {result}"),
    ("Brief Hospital Course", "{course} {aside}\n{frail} {unsettled}"),
    ("Discharge Medications", "{medicine_list}"),
    ("Discharge Disposition", "{disposition}"),
    ("Discharge Diagnosis", "{diagnosis_list}"),
    ("Discharge Condition", "{state} {mobility}"),
    ("Discharge Instructions", "{advice}\n{going_home}"),
    ("Followup Instructions", "{follow_up}"),
)  # fmt: skip

# The sections of a summary of a patient who died: no plans, and a last paragraph instead.
DEATH_SECTIONS = frozenset({
    "Admission Date", "Date of Birth", "Service", "Attending", "Chief Complaint", "History of Present "
    "Illness",
    "Past Medical History", "Social History", "Pertinent Results", "Brief Hospital Course", "Discharge "
    "Diagnosis",
})  # fmt: skip
DEATH_COURSE = lines("""
Despite maximal therapy {he} developed multi-organ failure. After discussion with family care was directed toward comfort; {he} passed away on [**{discharge_day}**].
{He} was found pulseless on [**{discharge_day}**]; resuscitation for {12-40} minutes was unsuccessful and {he} was pronounced dead. Family declined autopsy.
The family wished for comfort measures only; {he} was extubated on a morphine drip and expired peacefully on [**{discharge_day}**].""")

ADMISSION_NOTE: Template = (
    ("Chief Complaint", "{complaint}"),
    ("HPI", "{age_phrase} {man} with {history} presents with {complaint}. {story} {recent} {denies}"),
    ("Social History", "{home} {habits}"),
    ("Physical Examination", "GEN: {appearance} VS: {pressure} RESP: {breathing} {exam_belly} NEURO: "
    "{neuro}"),
    ("Labs", "{labs} {lactate}"),
    ("Imaging", "{film}"),
    ("Assessment and Plan", "{age_phrase} {man} with {complaint}. {plan} {regimen} {family_talk}"),
)  # fmt: skip

# Daily notes: the first line is written afresh each day, the others are copied forward with small edits.
PHYSICIAN_DAILY = lines("""
Chief Complaint: {complaint}. Hospital day {day}. 24 Hour Events: {event}
Subjective: {denies}
Exam: {pressure} Neuro: {cognition} Labs: {labs}
1. {Diagnosis}: {plan}
2. {mobility} {family_talk} Discussed with Dr. {last_name}.""")
NURSING_DAILY = lines("""
Shift note, HD {day}. {event}
{nursing_line}
{breathing} {urine}
Neuro: {neuro}
Activity: {mobility}
A/P: {plan}""")
NURSING_ADMISSION = lines("""
Pt is a {age_phrase} {man} admitted from {ED|OR|home|outside hospital|floor} with {complaint}. PMH: {history}.
Upon arrival: {appearance} {pressure}
{breathing} {urine} {neuro}
Allergies: {allergy}. {home} Belongings with {relative}.
Plan: {plan} {family_talk}""")
COMFORT = lines("""
Pt made CMO this shift after family meeting. Morphine drip titrated to comfort, family at bedside, priest called.
Pressors weaned off per family wishes, morphine and scopolamine for comfort. NEOB notified, support offered to family.""")
NEWBORN_DAILY = lines("""
NPN DOL #{day}: infant {baby_state}.
FEN: wt {2100-4100} gms, {baby_feeding}, voiding and stooling.
Parents in to visit, {independent with cares|asking appropriate questions|updated at bedside}.
DEV: {alert|sleeping well} between feeds, swaddled, sucks on pacifier. A/P: continue to support and monitor.""")
NEWBORN_SUMMARY: Template = (
    ("Admission Date", "[**{admit_day}**]              Discharge Date:   [**{discharge_day}**]"),
    ("Date of Birth", "[**{birth_day}**]             Sex:   {sex}"),
    ("Service", "NEONATOLOGY"),
    ("History", "Baby {boy} {last_name} is a {2100-4100} gram {late preterm|term} infant born to a "
    "{19-41} year old "
     "G{2-4}P{1-2} mother by {spontaneous vaginal delivery|repeat cesarean section}. Apgars {6-8} and {8-9}. "
     "Prenatal screens were unremarkable; maternal GBS {negative|positive, treated|unknown}."),
    ("Hospital Course by Systems", "RESPIRATORY: {baby_state}. FEN: {baby_feeding}. ID: CBC benign, blood "
    "culture "
     "negative, {ampicillin and gentamicin for 48 hours|no antibiotics}. HEME: {baby_state}."),
    ("Condition at Discharge", "Good. Hearing screen passed. Hepatitis B vaccine given on {when}."),
    ("Followup", "Pediatrician Dr. {last_name}, {phone}, in {two|three} days. Visiting nurse referral made."),
)  # fmt: skip

RADIOLOGY: dict[str, str] = {
    "CHEST (PORTABLE AP)": "{film} There is {no|minimal} change in cardiomediastinal silhouette.",
    "CHEST (PA & LAT)": "{film} Degenerative changes of the thoracic spine. No rib fracture is seen.",
    'CHEST PORT. LINE PLACEMENT "STAT"': "{Left|Right} {PICC|subclavian line} tip projects over the SVC. {film}",
    "CT HEAD W/O CONTRAST": "No intracranial hemorrhage, mass effect or shift. {Mild|Moderate} "
    "periventricular "
    "hypodensities are consistent with microvascular disease. Sinuses are {clear|partially opacified}.",
    "CT ABDOMEN W/CONTRAST": "Liver, spleen, pancreas and adrenals are unremarkable. {Simple|Multiple} "
    "renal cysts. "
    "{Sigmoid diverticulosis|Cholelithiasis} without {diverticulitis|inflammation}. No free fluid.",
    "RENAL U.S.": "The {left|right} kidney measures {8-12}.{0-9} cm. No hydronephrosis, stone or mass.",
    'KNEE (2 VIEWS) "LEFT"': "Joint space narrowing with osteophytes. No fracture or effusion.",
    "UNILAT LOWER EXT VEINS": "Normal compressibility and flow in the {common femoral|popliteal} veins. No thrombus.",
}
RADIOLOGY_FRAME = (
    "[**{note_day}**] {clock}\n {description}                    Clip # [**Clip Number (Radiology) "
    "{1-9999}**]\n"
    "Reason: {complaint}\n______________________________________________________________________________\n"
    "UNDERLYING MEDICAL CONDITION:\n  {age_phrase} {man} with {history}\nREASON FOR THIS EXAMINATION:\n"
    "  {evaluate for infiltrate|please assess interval change|r/o acute process|eval for etiology}\n"
    "                                 FINAL REPORT\nINDICATION: {complaint}. COMPARISON: "
    "{when}.\n\nFINDINGS: {finding}\n\n"
    "IMPRESSION: {impression}"
)
ECG = lines("""
Sinus {rhythm|tachycardia|bradycardia}. {Left|Right} axis deviation. Non-specific ST-T wave changes. Compared to the previous tracing of {when} no significant change.
Atrial fibrillation with {rapid|controlled} ventricular response. Low limb lead voltage. Clinical correlation is suggested.
Sinus rhythm with {first degree A-V block|premature atrial contractions}. {Left|Right} bundle-branch block. Since the previous tracing of {when} the rate has {slowed|increased}.
Normal ECG. No previous tracing available for comparison.
Ventricular paced rhythm at {60-80}. TRACING #{2-3}""")
ECHO = (
    "PATIENT/TEST INFORMATION:\nIndication: {complaint}.\nHeight: (in) {60-74}\nWeight (lb): {104-262}\n"
    "BP (mm Hg): {98-158}/{50-88}\nStatus: {Inpatient|Outpatient}\nDate/Time: [**{note_day}**] at "
    "{clock}\nTest: TTE "
    "(Complete)\n\nFindings:\nLEFT ATRIUM: {Mild|Moderate} LA enlargement.\nLEFT VENTRICLE: {Mild|Normal} "
    "symmetric LVH. "
    "LVEF {20-65}%.\nAORTIC VALVE: {Mildly|Moderately} thickened leaflets. {No|Trace|Mild} AR.\nMITRAL "
    "VALVE: {Mild|"
    "Moderate|Physiologic} MR.\nPERICARDIUM: {No|Small|Trivial} pericardial "
    "effusion.\n\nConclusions:\nThe left atrium is "
    "dilated. Global systolic function is {preserved|mildly depressed|severely depressed}. Compared with "
    "the prior "
    "study of {when}, {the findings are similar|mitral regurgitation is increased|function has improved}."
)

# Notes that some stays have: CATEGORY (with the trailing blanks of MIMIC), DESCRIPTION, how often, text.
OCCASIONAL: tuple[tuple[str, str, float, str], ...] = (
    ("Respiratory ", "Respiratory Care Shift Note", 0.18, "{respiratory_line} {respiratory_line} Plan: "
    "{wean as "
     "tolerated|continue current support|nebulizers every six hours}. Airway: {none|ETT size 7|trach "
     "collar}."),
    ("Nutrition", "Clinical Nutrition Note", 0.25, "Diet order: {NPO|regular|cardiac, diabetic|pureed "
    "with nectar "
     "thick liquids}. Ht {60-74} in, wt {48-118} kg. {nutrition} Estimated needs {1400-2300} kcal, "
     "{55-110} g protein. "
     "Recommend {Ensure Plus|Glucerna|Boost} TID, calorie counts, check prealbumin, page {phone} with "
     "questions."),
    ("Rehab Services", "Physical Therapy Evaluation Note", 0.35, "Attending Physician: {full_name}. "
    "Referral date: "
     "{when}. Prior level of function: {baseline_function} {home} Functional status: {mobility} Balance: "
     "{good|fair|"
     "poor} static sitting. Recommend {home with services|rehabilitation|home without services}, "
     "{gait|balance} training."),
    ("Social Work", "Social Work Progress Note", 0.22, "Referred by team for {coping|support|substance abuse|"
     "disposition}. {home} {helpers} {habits} Provided {emotional support|resources|contact number} to "
     "{relative}; "
     "will follow. Beeper {phone}."),
    ("Case Management ", "Case Management Initial Assessment", 0.28, "Insurance reviewed, ID "
    "{identifier}. {home} "
     "Services prior to admission: {VNA|none|home health aide}. {helpers} {follow_up} Facility screens "
     "sent to "
     "{hospital} and {place}. Contact: {info}."),
    ("General", "Generic Note", 0.15, "{Brief procedure note|Intern accept note|Overnight event}: called "
    "to see {him} for "
     "{symptom}. {appearance} {pressure} {event} {plan} Consent signed; blood loss {minimal|less than 10 "
     "cc|none}."),
    ("Pharmacy", "Pharmacy Vancomycin Note", 0.04, "Vancomycin {750|1000|1250} mg IV every {12|18|24} "
    "hours, trough "
     "{8-26}.{0-9}. Creatinine {creat}. {adherence} Recommend {no change|hold dose|repeat trough before "
     "fourth dose}."),
    ("Consult", "Infectious Disease Consult Note", 0.07, "Asked by Dr. {last_name} to comment on "
    "{complaint}. {story} "
     "{vaccination} No ticks, pets or travel to {place}. {plan} {plan} Thank you for involving us; page "
     "{phone}."),
)  # fmt: skip
ADDENDA = (
    "Addendum:\nThe discharge of {full_name} was delayed by one day awaiting a bed. {system} {pending}",
    "ADDENDUM TO DISCHARGE SUMMARY:\nFinal {blood|urine|sputum} cultures returned without growth. {lines} {follow_up}",
    "Addendum: medication list corrected, {medicine} was omitted in the summary dictated by {info}. Job {identifier}.",
)

# Columns of ADMISSIONS; a value that is written twice is twice as common.
DEMOGRAPHICS: tuple[tuple[str | None, ...], ...] = (
    ("Medicare", "Medicare", "Medicare", "Private", "Private", "Medicaid", "Government", "Self Pay"),
    ("ENGL", "ENGL", "ENGL", None, None, "SPAN", "RUSS", "PORT", "CANT"),
    ("CATHOLIC", "CATHOLIC", "PROTESTANT QUAKER", "JEWISH", "NOT SPECIFIED", "UNOBTAINABLE", "OTHER", None),
    ("MARRIED", "MARRIED", "SINGLE", "WIDOWED", "DIVORCED", "UNKNOWN (DEFAULT)", None),
    (
        "WHITE",
        "WHITE",
        "WHITE",
        "BLACK/AFRICAN AMERICAN",
        "HISPANIC OR LATINO",
        "ASIAN",
        "UNKNOWN/NOT SPECIFIED",
    ),
)
ADMISSION_LOCATIONS: dict[str, tuple[str, ...]] = {
    "EMERGENCY": ("EMERGENCY ROOM ADMIT", "EMERGENCY ROOM ADMIT", "CLINIC REFERRAL/PREMATURE"),
    "URGENT": ("TRANSFER FROM HOSP/EXTRAM", "PHYS REFERRAL/NORMAL DELI", "TRANSFER FROM SKILLED NUR"),
    "ELECTIVE": ("PHYS REFERRAL/NORMAL DELI",),
    "NEWBORN": ("PHYS REFERRAL/NORMAL DELI", "CLINIC REFERRAL/PREMATURE"),
}
